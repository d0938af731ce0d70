"""Turns a stored result into a value or an exception that is safe to raise, in calling processes.

A stored error names a class. Celery looks the name up in all loaded modules, and would raise a
``SystemExit`` that was written into the backend. This module accepts only known classes: built-in
ones, Celery's, ours, registered ones, and those of modules that declare a service. For any other
class it raises ``RemoteTaskError``.
"""

from __future__ import annotations

import builtins
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

import billiard.exceptions
import celery.exceptions
import kombu.exceptions
from celery import states
from celery.result import AsyncResult
from celery.utils.serialization import UnpickleableExceptionWrapper

from gw_celery import codec, errors, signals

#: Maximum characters of a message or traceback that a caller sees.
_MOST = 20_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_LIBRARIES = (builtins, celery.exceptions, billiard.exceptions, kombu.exceptions, errors)
#: Task options that list exception classes.
_OPTIONS = ("throws", "autoretry_for", "dont_autoretry_for")


class Result(AsyncResult):
    """Celery's ``AsyncResult``, which raises only known classes or ``RemoteTaskError``."""

    def _set_cache(self, d: dict[str, Any]) -> Any:
        """Cache the record with an error that is safe, because Celery raises what it finds here."""
        if d["status"] in states.PROPAGATE_STATES:
            d = {**d, "result": restored(d["result"], d.get("traceback"))}
        return super()._set_cache(d)


def restored(stored: Any, traceback: str | None) -> Exception:
    """Return the exception of a record, or a ``RemoteTaskError`` if its class is not known.

    Args:
        stored: Celery's mapping, or the exception that Celery made of it.
        traceback: the remote traceback, which becomes the ``__cause__``.
    """
    made: Exception | None = None
    if isinstance(stored, BaseException):
        cls, arguments = type(stored), stored.args
        module, name = cls.__module__, cls.__qualname__
        if isinstance(stored, Exception) and _class(f"{module}.{name}") is cls:
            made = stored
    elif isinstance(stored, Mapping) and "exc_type" in stored:
        module, name = str(stored.get("exc_module") or ""), str(stored["exc_type"])
        arguments = _arguments(stored.get("exc_message", ""))
    else:
        module, name, arguments = "", "unknown error", (repr(stored),)
    if name == UnpickleableExceptionWrapper.__name__ and len(arguments) == 4:
        # Celery's stand-in for a class that it cannot import: (module, class, args, text).
        module, name, message, _ = arguments
        arguments = _arguments(message)
    elif made is None:
        made = _made(f"{module or 'builtins'}.{name}", arguments, traceback or "")
    text = _clean(traceback or "", from_end=True)
    if made is None:
        type_name = _clean(f"{module}.{name}" if module else str(name))
        made = errors.RemoteTaskError(type_name, _clean(", ".join(map(str, arguments))), text)
    if text:
        made.__cause__ = errors.RemoteTraceback(text)
    return made


def _arguments(message: Any) -> tuple[Any, ...]:
    return tuple(message) if isinstance(message, list | tuple) else (message,)


def _made(name: str, arguments: tuple[Any, ...], traceback: str) -> Exception | None:
    """Return an exception with the remote text if its class is known and can express it.

    A class with its own constructor may not accept its ``args``, or may interpret them differently:
    ``CodeError("nope", 404)`` with the ``args`` ``("E404: nope",)`` would become
    ``"E500: E404: nope"``.
    """
    if (cls := _class(name)) is None:
        return None
    try:
        made = cls(*arguments)
        text = str(made)
    except Exception:
        return None
    # A library's exception may show attributes that do not travel, such as a file name.
    is_custom = sys.modules.get(cls.__module__) not in _LIBRARIES and any(
        isinstance(getattr(cls, method), types.FunctionType)
        for method in ("__new__", "__init__", "__str__")
    )
    last_line = f"{cls.__qualname__}: {text}\n" if text else f"{cls.__qualname__}\n"
    says_else = cls.__qualname__ in traceback and last_line not in f"{traceback}\n"
    return None if made.args != arguments or (is_custom and says_else) else made


def _class(name: str) -> type[Exception] | None:
    """Return the known class of this name; ``None`` if there is none."""
    declared = signals.registries()
    services = [service for owner in declared for service in owner.services.values()]
    targets = [service.target for service in services]
    targets += [context.cls for owner in declared for context in owner.contexts.values()]
    modules = {target.__module__ for target in targets} & sys.modules.keys()
    classes = [
        cls
        for module in (*_LIBRARIES, *(sys.modules[module] for module in modules))
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ in sys.modules
    ]
    for service in services:
        for method in service.methods.values():
            classes += [cls for option in _OPTIONS for cls in method.options.get(option) or ()]
    # Callers only get subclasses of Exception.
    by_name = {
        f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes if issubclass(cls, Exception)
    }
    return by_name.get(name) or codec.exception_class(name)


def _clean(text: str, *, from_end: bool = False) -> str:
    """Shorten ``text`` (a traceback from its start), and remove control characters."""
    cut = text[-_MOST:] if from_end else text[:_MOST]
    return _CONTROL.sub("", cut)
