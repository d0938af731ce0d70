"""Turn what a result backend stored into a value or an exception that is safe to raise.

A stored error names a class. Celery looks the name up among all loaded modules and would raise a
``SystemExit`` that was written into the backend. Here only classes that are known beforehand
come back: built-in ones, Celery's, ours, registered ones, and those defined in a module that
declares a service. Everything else is a ``RemoteTaskError``.
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

#: Longest message and traceback that a caller is shown, in characters.
_MOST = 20_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_LIBRARIES = (builtins, celery.exceptions, billiard.exceptions, kombu.exceptions, errors)
#: Task options that name exceptions.
_OPTIONS = ("throws", "autoretry_for", "dont_autoretry_for")


class Result(AsyncResult):
    """Celery's ``AsyncResult`` whose errors are known classes or ``RemoteTaskError``."""

    def _set_cache(self, d: dict[str, Any]) -> Any:
        """Keep a record whose error is safe to raise: Celery raises it as it finds it here."""
        if d["status"] in states.PROPAGATE_STATES:
            d = {**d, "result": restored(d["result"], d.get("traceback"))}
        return super()._set_cache(d)


def value_of(meta: Mapping[str, Any]) -> Any:
    """Return the answer in a backend's record of a finished task, or raise its error.

    Args:
        meta: ``status``, ``result`` and ``traceback``; ``result`` of an error is Celery's
            mapping of ``exc_type``, ``exc_message`` and ``exc_module``, or an exception.
    """
    if meta["status"] not in states.PROPAGATE_STATES:
        return meta["result"]
    raise restored(meta["result"], meta.get("traceback"))


def restored(stored: Any, traceback: str | None) -> Exception:
    """Return the exception that a record has, or describes; of an unknown class a stand-in.

    Args:
        stored: Celery's mapping, or the exception that Celery made of it.
        traceback: the remote one, which becomes the cause.
    """
    if isinstance(stored, BaseException):
        cls = type(stored)
        if isinstance(stored, Exception) and _class(f"{cls.__module__}.{cls.__qualname__}") is cls:
            return _with_cause(stored, traceback)
        stored = {
            "exc_module": cls.__module__,
            "exc_type": cls.__qualname__,
            "exc_message": stored.args,
        }
    if not isinstance(stored, Mapping) or "exc_type" not in stored:
        return _unknown("unknown error", (repr(stored),), traceback)
    module, name = str(stored.get("exc_module") or ""), str(stored["exc_type"])
    arguments = _arguments(stored.get("exc_message", ""))
    if name == UnpickleableExceptionWrapper.__name__ and len(arguments) == 4:
        # Celery's stand-in for a class that cannot be imported: (module, class, args, text).
        module, name, stored_arguments, _ = arguments
        return _unknown(f"{module}.{name}", _arguments(stored_arguments), traceback)
    known = _class(f"{module or 'builtins'}.{name}")
    made = None if known is None else _made(known, arguments, traceback or "")
    if made is None:
        return _unknown(f"{module}.{name}" if module else name, arguments, traceback)
    return _with_cause(made, traceback)


def _made(cls: type[Exception], arguments: tuple[Any, ...], traceback: str) -> Exception | None:
    """Return an exception that says what the remote one said, if ``cls`` can be made so.

    A class with a constructor of its own may want other arguments than its ``args``, or take these
    for something else: ``CodeError("nope", 404)`` whose ``args`` are ``("E404: nope",)`` would
    become ``"E500: E404: nope"``.
    """
    try:
        made = cls(*arguments)
        is_same = made.args == arguments and not _says_else(made, traceback)
    except Exception:
        return None
    return made if is_same else None


def _says_else(made: Exception, traceback: str) -> bool:
    """Whether the last line of the remote traceback has another text for this exception."""
    cls, text = type(made), str(made)
    if sys.modules.get(cls.__module__) in _LIBRARIES or not _is_custom(cls):
        return False  # they may show what does not travel: a file's name, an object's own text
    line = f"{cls.__qualname__}: {text}\n" if text else f"{cls.__qualname__}\n"
    return cls.__qualname__ in traceback and line not in f"{traceback}\n"


def _is_custom(cls: type[Exception]) -> bool:
    """Whether its arguments, or its text, are made by Python code."""
    return any(
        isinstance(getattr(cls, name), types.FunctionType)
        for name in ("__new__", "__init__", "__str__")
    )


def _arguments(message: Any) -> tuple[Any, ...]:
    return tuple(message) if isinstance(message, list | tuple) else (message,)


def _class(name: str) -> type[Exception] | None:
    return _known_classes().get(name) or codec.exception_class(name)


def _known_classes() -> dict[str, type[Exception]]:
    declared = signals.registries()
    services = [service for owner in declared for service in owner.services.values()]
    targets = [service.target for service in services]
    targets += [context.cls for owner in declared for context in owner.contexts.values()]
    names = {target.__module__ for target in targets} & sys.modules.keys()
    classes = [
        cls
        for module in (*_LIBRARIES, *(sys.modules[name] for name in names))
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ in sys.modules
    ]
    for service in services:
        for method in service.methods.values():
            classes += [cls for option in _OPTIONS for cls in method.options.get(option) or ()]
    # What a caller gets is an Exception, whatever a body may throw.
    return {
        f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes if issubclass(cls, Exception)
    }


def _with_cause(exc: Exception, traceback: str | None) -> Exception:
    if traceback:
        exc.__cause__ = errors.RemoteTraceback(_clean(traceback, from_end=True))
    return exc


def _unknown(name: str, arguments: tuple[Any, ...], traceback: str | None) -> Exception:
    message = _clean(", ".join(map(str, arguments)))
    text = _clean(traceback or "", from_end=True)
    return _with_cause(errors.RemoteTaskError(_clean(name), message, text), traceback)


def _clean(text: str, *, from_end: bool = False) -> str:
    """Cut ``text`` and take out what a terminal would obey; a traceback matters at its end."""
    cut = text[-_MOST:] if from_end else text[:_MOST]
    return _CONTROL.sub("", cut)
