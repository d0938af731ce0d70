"""Validates the arguments of our decorators, in every process that imports the user's modules.

A function here raises ``DeclarationError`` with the argument, its value and the rule it breaks.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

from gw_celery import errors

P = ParamSpec("P")
R = TypeVar("R")

#: Keywords that describe a whole service: ``@app.remote`` and ``@app.cls`` take them.
OF_A_SERVICE = ("gpu", "queue", "min_workers", "max_workers", "timeout", "max_queue_time")
#: Keywords that describe one task: ``@app.remote`` and ``@gw.method`` take them.
OF_A_TASK = (
    "benchmark_dataset", "benchmark_generator", "benchmark_runs", "benchmark_concurrency",
    "workload_calculator",
)  # fmt: skip
#: Celery's own options of a task or a method; a test compares them with Celery.
OF_CELERY = (
    "acks_late", "acks_on_failure", "acks_on_failure_or_timeout", "acks_on_timeout",
    "after_return", "autoretry_for", "backend", "base", "before_start", "bind", "compression",
    "default_retry_delay", "delivery_mode", "dont_autoretry_for", "expires", "filter",
    "ignore_result", "immediate", "lazy", "mandatory", "max_retries", "name", "on_failure",
    "on_replace", "on_retry", "on_success", "priority", "pydantic", "pydantic_context",
    "pydantic_dump_kwargs", "pydantic_strict", "rate_limit", "reject_on_worker_lost", "Request",
    "resultrepr_maxsize", "retry_backoff", "retry_backoff_max", "retry_jitter", "retry_kwargs",
    "retry_on_worker_lost", "send_events", "serializer", "shadow_name", "shared",
    "soft_time_limit", "store_errors_even_if_ignored", "Strategy", "throws", "time_limit",
    "track_started", "trail", "typing",
)  # fmt: skip
_OF_A_CLASS = (*OF_A_SERVICE, "probes")
_KNOWN = (*_OF_A_CLASS, *OF_A_TASK, *OF_CELERY)
#: Options that list exception classes; Celery also accepts a single class for some of them.
_EXCEPTIONS = ("throws", "autoretry_for", "dont_autoretry_for")
#: The serializers that workers read: pickle can run code, and yaml changes types.
_SERIALIZERS = ("gw-json", "json")


def integer(argument: str, value: object, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is an int (not a bool) within ``low..high``."""
    span = f"{low} or more" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise errors.DeclarationError(argument, value, f"must be an int, {span}")
    if value < low or (high is not None and value > high):
        raise errors.DeclarationError(argument, value, f"must be {span}")
    return value


def positive(argument: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number (not a bool) over 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # an int of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or number <= 0:
        raise errors.DeclarationError(argument, value, "must be a finite number over 0")
    return number


def optional(argument: str, value: object) -> float | None:
    """Like ``positive``, but accept ``None``, which means "no limit"."""
    return None if value is None else positive(argument, value)


def function(argument: str, value: Any) -> Any:
    """Return ``value`` if it is ``None`` or callable."""
    if value is not None and not callable(value):
        raise errors.DeclarationError(argument, value, "must be a function")
    return value


def soft_before_hard(options: Mapping[str, Any], timeout: float | None) -> None:
    """Check that the soft limit does not exceed the hard limit (default: ``timeout``)."""
    soft, hard = options.get("soft_time_limit"), options.get("time_limit", timeout)
    if soft is not None and hard is not None and soft > hard:
        name = "time_limit" if "time_limit" in options else "timeout"
        raise errors.DeclarationError(
            "soft_time_limit", soft, f"would never be reached: must not be over {name}={hard:g}"
        )


def knows_its_keywords(label: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator refuse a misspelt keyword with the nearest valid one.

    Python's own ``TypeError`` does not suggest a keyword.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        known = [entry.name for entry in parameters if entry.kind is not entry.POSITIONAL_ONLY]

        @functools.wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            unknown(label, keywords, known)
            return function(*args, **keywords)

        return checked

    return decorate


def unknown(label: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse the first keyword that is not ``known``; suggest the nearest, or list all."""
    for name, value in given.items():
        if name not in known:
            takes = f"{label} takes {', '.join(known) or 'none'}"
            hint = errors.near_miss(name.lower(), known, "{}=") or takes
            raise errors.DeclarationError(name, value, f"unknown argument; {hint}")


def options_of_remote(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Celery options of ``@app.remote``, and the user's own task attributes."""
    _misplaced(keywords, ("probes",), "concerns a class: @app.cls takes it")
    return _options(keywords, (*OF_A_SERVICE, *OF_A_TASK, *OF_CELERY))


def options_of_method(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Celery options of ``@gw.method``, and the user's own task attributes."""
    _misplaced(keywords, _OF_A_CLASS, "concerns the whole class: give it to @app.cls")
    return _options(keywords, _KNOWN)


def unknown_of_class(keywords: Mapping[str, Any]) -> None:
    """Refuse the keywords that ``@app.cls`` does not take: a class is not a task."""
    _misplaced(keywords, (*OF_A_TASK, *OF_CELERY), "concerns one task: give it to @gw.method()")
    _misspelt(keywords, _KNOWN)
    takes = f"is no argument of @app.cls; it takes: {', '.join(_OF_A_CLASS)}"
    _misplaced(keywords, keywords, takes)


def _options(keywords: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    routed = "names no queue: a service is reached by its queue alone, which queue= names"
    _misplaced(keywords, ("exchange", "routing_key"), routed)
    _misspelt(keywords, known)
    name = keywords.get("name")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise errors.DeclarationError("name", name, "must be the name of a task")
    for limit in ("time_limit", "soft_time_limit"):
        optional(limit, keywords.get(limit))
    serializer = keywords.get("serializer", _SERIALIZERS[0])
    if serializer not in _SERIALIZERS:
        raise errors.DeclarationError(
            "serializer",
            serializer,
            f"must be {' or '.join(_SERIALIZERS)}; gw.register_type lets a class travel in gw-json",
        )
    listed = {name: _exceptions(name, keywords[name]) for name in _EXCEPTIONS if name in keywords}
    return {**keywords, **listed}


def _misplaced(keywords: Mapping[str, Any], names: Collection[str], rule: str) -> None:
    for name, value in keywords.items():
        if name in names:
            raise errors.DeclarationError(name, value, rule)


def _misspelt(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a keyword that resembles a known one; Celery accepts any attribute of a task."""
    for name, value in given.items():
        hint = errors.near_miss(name.lower(), known, "{}=", cutoff=0.8)
        if name not in known and hint:
            raise errors.DeclarationError(name, value, f"unknown argument; {hint}")


def _exceptions(option: str, value: Any) -> tuple[type[BaseException], ...]:
    listed = (value,) if isinstance(value, type) else value
    if not isinstance(listed, list | tuple | set | frozenset) or not all(
        isinstance(cls, type) and issubclass(cls, BaseException) for cls in listed
    ):
        raise errors.DeclarationError(option, value, "must be a tuple of exception classes")
    return tuple(listed)
