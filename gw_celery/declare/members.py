"""The marked members of a class and its bases; a mark without an effect is refused."""

from __future__ import annotations

import inspect
from typing import Any

from gw_celery import errors
from gw_celery.declare import markers
from gw_celery.types import AnyFunction

_LABELS = {
    markers.METHOD: "gw.method",
    markers.ENTER: "gw.on_enter",
    markers.EXIT: "gw.on_exit",
    markers.BATCHED: "gw.batched",
    markers.CONCURRENT: "gw.concurrent",
}


def methods(cls: type) -> dict[str, AnyFunction]:
    """Return the functions that ``@gw.method`` marks, by name.

    Raises:
        DeclarationError: when there is none, or a mark of the class stands where it has no effect.
    """
    _require_functions(cls)
    tasks = _marked(cls, markers.METHOD)
    if not tasks:
        raise errors.DeclarationError(
            "class", cls.__qualname__, "has no method marked with @gw.method()"
        )
    for name in _marked(cls, markers.CONCURRENT):
        raise errors.DeclarationError("gw.concurrent", name, "marks the class, not a method of it")
    for name in _marked(cls, markers.BATCHED):
        if name not in tasks:
            raise errors.DeclarationError("gw.batched", name, "marks a task: add @gw.method()")
    for name, fn in tasks.items():
        _require_task(name, fn)
    return tasks


def hooks(cls: type, mark: str) -> tuple[str, ...]:
    """Return the names of the methods with ``mark``, in definition order, base classes first.

    Raises:
        DeclarationError: for a hook that cannot be called without arguments.
    """
    functions = _marked(cls, mark)
    for name, fn in functions.items():
        require_one_answer(_LABELS[mark], fn)
        try:
            inspect.signature(fn).bind(object())
        except TypeError as exc:
            raise errors.DeclarationError(
                _LABELS[mark], name, f"the worker calls a hook with `self` alone: {exc}"
            ) from exc
    return tuple(functions)


def require_one_answer(label: str, fn: AnyFunction) -> None:
    """Refuse a generator function: its body would never run."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise errors.DeclarationError(
            label,
            fn.__qualname__,
            "yields, and its body would never run: return one value, or a list",
        )


def require_instantiable(cls: object) -> None:
    """Refuse a class that a replica cannot instantiate without arguments."""
    if not inspect.isclass(cls):
        raise errors.DeclarationError("class", cls, "@app.cls decorates a class")
    if markers.SERVICE in vars(cls):
        raise errors.DeclarationError("class", cls.__qualname__, "is decorated twice")
    if not cls.__dictoffset__:
        raise errors.DeclarationError(
            "class", cls.__qualname__, 'keeps no __dict__; add "__dict__" to its __slots__'
        )
    if cls.__init__ is object.__init__:
        return
    try:
        inspect.signature(cls.__init__).bind(object())
    except TypeError as exc:
        raise errors.DeclarationError(
            "class",
            cls.__qualname__,
            f"is made without arguments in each replica ({exc}); use gw.parameter() for values "
            f"that callers set, and @gw.on_enter() to load",
        ) from exc


def _marked(cls: type, mark: str) -> dict[str, AnyFunction]:
    """Members with ``mark`` in definition order, base classes first, overrides in place."""
    names: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            if hasattr(_plain(member), mark):
                names.setdefault(name)
    members = {name: _plain(inspect.getattr_static(cls, name)) for name in names}
    return {name: fn for name, fn in members.items() if hasattr(fn, mark)}


def _plain(member: Any) -> Any:
    """Return the user's function behind what an earlier ``@app.cls`` put into a base class."""
    return getattr(member, markers.FUNCTION, member)


def _require_functions(cls: type) -> None:
    """Refuse marks that ``@staticmethod``, ``@classmethod`` or ``@property`` hide."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name, None)
        if isinstance(member, staticmethod | classmethod):
            function: object = member.__func__
        elif isinstance(member, property):
            function = member.fget
        else:
            continue
        for mark, label in _LABELS.items():
            if hasattr(function, mark):
                wrapper = type(member).__name__
                raise errors.DeclarationError(
                    label, name, f"marks a method that takes `self`: take @{wrapper} away"
                )


def _require_task(name: str, fn: AnyFunction) -> None:
    if hasattr(fn, markers.ENTER) or hasattr(fn, markers.EXIT):
        raise errors.DeclarationError(
            "gw.method", name, "is a hook too, which only the worker calls: take one mark away"
        )
    if getattr(fn, markers.METHOD).options.get("bind"):
        raise errors.DeclarationError(
            "bind", True, "`self` of a method is its instance: use celery.current_task"
        )
    require_one_answer("gw.method", fn)
