"""The ways to call: a task, with what one caller fixed, and what ``Cls(...)`` makes."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import amqp.basic_message
from celery import Celery, Task
from celery.app.amqp import AMQP
from kombu.messaging import Producer

from gw_celery import conf, errors
from gw_celery.client import calls, execution
from gw_celery.declare import check, markers, parameters, services
from gw_celery.protocol import headers
from gw_celery.types import AnyFunction


class CallMethods:
    """The ways to call a task that Celery's tasks do not have.

    ``_gw_``: a base class of the user's may have an ``_options`` of its own.
    """

    _gw_options: Mapping[str, Any] = {}
    _gw_timeout: float | None = None
    apply_async: Callable[..., Any]

    @property
    def _gw_task(self) -> Any:
        return self

    def options(self, *, timeout: float | None = None, **options: Any) -> BoundTask:
        """Return the same task with a ``timeout`` and any option of ``apply_async``.

        Raises:
            UsageError: for an option that is nearly a known one.
        """
        _refuse_misspelt(options)
        bound = self._gw_timeout if timeout is None else check.positive("timeout", timeout)
        return BoundTask(self._gw_task, self._gw_merged(options), bound)

    def spawn(self, *args: Any, **kwargs: Any) -> calls.Spawned:
        """Send the task and return a handle to ``get``, ``await`` or ``cancel``.

        Raises:
            CallTimeout: when it could not be sent in ``.options(timeout=...)`` seconds.
        """
        spawned = self._gw_spawned(args, kwargs)
        spawned._wait_sent()
        return spawned

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task, block until it is answered, and return its value or raise its error.

        Raises:
            BlockingCallError: on a running event loop, or inside a task.
            CallTimeout: after ``.options(timeout=...)`` or ``gw_call_timeout`` seconds.
        """
        calls.require_may_block(f"{self._gw_task.name}.remote()")
        bound = self._gw_timeout
        if bound is None:
            bound = conf.read(self._gw_task.app.conf).call_timeout
        return calls.block(self._gw_spawned(args, kwargs)._value(bound))

    async def aremote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task and wait for its answer without blocking the event loop.

        Raises:
            CallTimeout: after ``.options(timeout=...)`` seconds.
        """
        if self._gw_task.app.conf.task_always_eager:
            self._gw_require_result()
            runtime = execution.started(self._gw_task.app)
            send = functools.partial(self.apply_async, args, kwargs)
            sent = await runtime.call_eagerly(self._gw_task, send)
            return sent.get(disable_sync_subtasks=False)
        return await self._gw_spawned(args, kwargs)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``await task(x)``: run it here when this process serves it, send it otherwise.

        Inside a body it runs here only when that takes no second slot of a service that the
        caller holds already.
        """
        runtime = execution.current()
        if runtime is not None and runtime.can_run(self._gw_task):
            return await runtime.run_async(self._gw_task, self._gw_options, args, kwargs)
        return await self.aremote(*args, **kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body in this process, entering what it needs first, and return its answer."""
        done = self._gw_task.apply(args, kwargs, throw=True, **self._gw_merged({}))
        return done.get(disable_sync_subtasks=False)

    def _no_canvas(self, *_: Any, **__: Any) -> Any:
        """Refused: Celery would not run the body where its model is loaded.

        Raises:
            UsageError: always, with what to write.
        """
        task = self._gw_task
        service, method = task.gw_service, task.gw_method
        written = f"{service.name}(...).{method.name}" if service.is_class else task.name
        raise errors.UsageError(
            f"{task.name}.map(), .starmap() and .chunks() would call the body one by one in "
            f"a plain Celery task, where its model is not loaded: write group({written}.s(x) for x "
            f"in xs)"
        )

    map = starmap = chunks = _no_canvas

    def _gw_spawned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> calls.Spawned:
        self._gw_require_result()
        app = self._gw_task.app
        if app.conf.task_always_eager:
            sending: calls.Sending = Future()
            sending.set_result(self.apply_async(args, kwargs))
        else:
            send = functools.partial(self.apply_async, args, kwargs)
            sending = calls.watcher(app).submit(send)
        return calls.Spawned(self._gw_task, sending, self._gw_timeout)

    def _gw_merged(self, options: dict[str, Any]) -> dict[str, Any]:
        merged = {**self._gw_options, **options}
        if both := {**self._gw_options.get("headers", {}), **(options.get("headers") or {})}:
            merged["headers"] = both
        return merged

    def _gw_require_result(self) -> None:
        if self._gw_options.get("ignore_result", self._gw_task.ignore_result):
            raise errors.UsageError(
                f"{self._gw_task.name} ignores its result, so there is no answer to wait for: call "
                f".delay(), or declare it with ignore_result=False"
            )


class BoundTask(CallMethods):
    """Call a task: ``.delay()`` and Celery's others, ``await``, ``.remote()``, ``.spawn()``.

    Args:
        task: the Celery task.
        options: Celery's ``apply_async`` options, used for every call.
        timeout: seconds that a caller waits for an answer; ``None`` for as long as it takes.
    """

    _gw_task: Any = None

    def __init__(self, task: Any, options: Mapping[str, Any], timeout: float | None = None) -> None:
        self._gw_task = task
        self._gw_options = options
        self._gw_timeout = timeout

    def __repr__(self) -> str:
        return f"<BoundTask {self.task.name}>"

    @property
    def task(self) -> Any:
        """The Celery task behind it."""
        return self._gw_task

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the task with Celery's options and return its ``AsyncResult``."""
        return self.task.apply_async(args, kwargs, **self._gw_merged(options))

    def signature(
        self, args: Any = None, kwargs: Any = None, *, immutable: bool = False, **options: Any
    ) -> Any:
        """Return Celery's signature of a call, for chains, groups and chords."""
        return self.task.signature(args, kwargs, self._gw_merged(options), immutable=immutable)

    # Celery's, which go by ``apply_async`` and ``signature``.
    delay, s, si = Task.delay, Task.s, Task.si


def _refuse_misspelt(options: Mapping[str, Any]) -> None:
    """Refuse what is nearly an option of a call, and would be sent in silence.

    Anything else may be meant for the broker: Celery hands what it does not know to its publisher.
    """
    stamps = options.get("stamped_headers") or ()
    for name, value in options.items():
        if name in _known_options() or name in stamps:
            continue
        if hint := errors.near_miss(name, _known_options(), "{}=", cutoff=0.8):
            raise errors.UsageError(f"options({name}={value!r}): unknown option; {hint}")


@functools.cache
def _known_options() -> frozenset[str]:
    """Ours, Celery's and kombu's, and AMQP's properties."""
    take = (Task.apply_async, Celery.send_task, AMQP.as_task_v2, Producer.publish)
    names = {name for function in take for name in inspect.signature(function).parameters}
    properties = {name for name, _ in amqp.basic_message.Message.PROPERTIES}
    unsaid = {"timeout", "queue", "exchange_type"}
    return frozenset(names | properties | unsaid) - {"self", "args", "kwargs", "options"}


class Handle:
    """A class task with the parameters of one caller; its attributes are the methods."""

    # Two underscores: Python renames these to what no user's method is called.
    def __init__(
        self, service: services.Service, tasks: dict[str, Any], values: dict[str, Any]
    ) -> None:
        self.__service = service
        self.__tasks = tasks
        self.__values = parameters.bind(service.name, service.parameters, values)
        self.__options: dict[str, Any] = {}
        if self.__values:
            written = parameters.canonical(self.__values)
            self.__options["headers"] = {headers.PARAMETERS: written}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__values.items())
        return f"{self.__service.name}({shown})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # first: ``copy`` asks before there is anything to look in
            raise AttributeError(name)
        if name in self.__tasks:
            return BoundTask(self.__tasks[name], self.__options)
        service = self.__service
        if name in service.enter_hooks or name in service.exit_hooks:
            raise errors.UsageError(
                f"{service.name}.{name} is a hook: the worker calls it when it loads or unloads"
            )
        listed = ", ".join(service.methods)
        raise errors.UnknownAttribute(
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


_CALLS = frozenset(name for name in dir(BoundTask) if not name.startswith("_"))


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
