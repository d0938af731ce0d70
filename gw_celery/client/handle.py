"""What ``Cls(...)`` makes outside a replica: a light handle whose methods are calls."""

from __future__ import annotations

import types
from typing import Any

from gw_celery import errors
from gw_celery.client import bound
from gw_celery.declare import markers, parameters, services
from gw_celery.protocol import headers
from gw_celery.types import AnyFunction


class Handle:
    """A class task with the parameters of one caller; its attributes are the methods."""

    # Two underscores: Python renames these to what no user's method is called.
    def __init__(
        self, service: services.Service, tasks: dict[str, Any], values: dict[str, Any]
    ) -> None:
        self.__service = service
        self.__tasks = tasks
        self.__values = parameters.bind(service.name, service.parameters, values)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__values.items())
        return f"{self.__service.name}({shown})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # first: ``copy`` asks before there is anything to look in
            raise AttributeError(name)
        if name in self.__tasks:
            return bound.BoundTask(self.__tasks[name], _options(self.__values))
        raise _no_method(self.__service, name)


def _options(values: dict[str, Any]) -> dict[str, Any]:
    return {"headers": {headers.PARAMETERS: parameters.canonical(values)}} if values else {}


def _no_method(service: services.Service, name: str) -> errors.UsageError | AttributeError:
    if name in service.enter_hooks or name in service.exit_hooks:
        return errors.UsageError(
            f"{service.name}.{name} is a hook: the worker calls it when it loads or unloads"
        )
    listed = ", ".join(service.methods)
    return AttributeError(
        f"{service.name}() has no method {name!r} marked with @gw.method(); it has: {listed}"
    )


class MethodOfClass:
    """Takes the place of a marked method in its class.

    On an instance, in a replica, it is the plain method. On the class it has no caller's
    parameters to go by, so that calling it is refused with what to write.
    """

    def __init__(self, function: AnyFunction, owner: str) -> None:
        setattr(self, markers.FUNCTION, function)
        self._function = function
        self._owner = owner
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else types.MethodType(self._function, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain function with an instance, as ``super().method`` does."""
        if not args or isinstance(args[0], Handle):
            raise self._refused("(...)")
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _CALLS:
            raise self._refused(f".{name}(...)")
        raise AttributeError(name)

    def _refused(self, call: str) -> errors.UsageError:
        name = self.__name__
        return errors.UsageError(
            f"{self._owner}.{name}{call} needs an instance: write {self._owner}().{name}{call}"
        )


_CALLS = frozenset(name for name in dir(bound.BoundTask) if not name.startswith("_"))


def install(service: services.Service, tasks: dict[str, Any]) -> None:
    """Let ``Cls(...)`` make handles, and guard the methods of the class itself."""
    cls = service.target
    for name in service.methods:
        setattr(cls, name, MethodOfClass(service.methods[name].function, service.name))

    def make(called: type, *args: Any, **values: Any) -> Any:
        if called is not cls:  # a subclass that is no service of its own is an ordinary class
            return object.__new__(called)
        if args:
            raise errors.UsageError(
                f"{service.name}() takes parameters by name: "
                f"{', '.join(service.parameters) or 'it has none'}"
            )
        return Handle(service, tasks, values)

    cls.__new__ = make
    setattr(cls, markers.SERVICE, service)
