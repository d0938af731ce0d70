"""What our tasks write into the headers of a message, and which they do not send at all."""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

from celery._state import get_current_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.time import maybe_iso8601, maybe_make_aware

from gw_celery import conf, errors
from gw_celery.client import execution, wait_estimates
from gw_celery.protocol import headers

logger = logging.getLogger(__name__)

#: What Celery gives to the tasks of a canvas, and to those that it sends by itself: refused in the
#: middle of it, a chord would never end, and a retry or the rest of a chain be lost.
_IN_CANVAS = ("group_id", "chord", "parent_id", "retries")

#: Written by us, for this very input.
_WRITTEN = (headers.WORKLOAD, headers.ENQUEUED)
#: Not the calculator's: they interrupt the body that makes the call.
_INTERRUPTS = (
    SoftTimeLimitExceeded,
    asyncio.CancelledError,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    execution.Stopped,
)

#: Tasks whose calculator has been complained of in this process.
_warned: set[str] = set()
_settings: weakref.WeakKeyDictionary[Any, conf.Settings] = weakref.WeakKeyDictionary()


def prepared(task: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` of ``apply_async`` with our headers.

    Raises:
        QueueTimeExceeded: when the input would wait for longer than it may.
    """
    limit = task.gw_service.placement.max_queue_time or _settings_of(task.app).max_queue_time
    if limit is not None:
        _require_room(task, options, limit)
    sent = options.get("headers") or {}
    ours = _ours(task, args, kwargs, options, limit)
    # A retry has the headers of the input that it repeats; those of another one may be passed on.
    kept = {key: sent[key] for key in sent if key not in _WRITTEN}
    if ours or len(kept) != len(sent):
        return {**options, "headers": {**kept, **ours}}
    return options


def _ours(
    task: Any, args: Any, kwargs: Any, options: dict[str, Any], limit: float | None
) -> dict[str, float]:
    ours = {}
    if (calculate := task.gw_method.workload_calculator) is not None:
        ours[headers.WORKLOAD] = _workload(task, calculate, args or (), kwargs or {})
    if limit is not None:
        countdown, eta = options.get("countdown"), options.get("eta")
        ours[headers.ENQUEUED] = _starts_waiting(task.app, countdown, eta)
    return ours


def _starts_waiting(app: Any, countdown: Any, eta: Any) -> float:
    """Return since when an input that is sent now waits: from its ETA on, where it has one.

    What Celery will refuse counts as no ETA.
    """
    now = time.time()
    try:
        if countdown:
            return now + max(0.0, float(countdown))
        if eta:
            at: dt.datetime = maybe_make_aware(maybe_iso8601(eta), app.timezone)
            return max(now, at.timestamp())
    except (TypeError, ValueError, AttributeError, OverflowError):
        return now
    return now


def _workload(task: Any, calculate: Callable[..., Any], args: Any, kwargs: Any) -> float:
    try:
        answer = calculate(*args, **kwargs)
    except _INTERRUPTS:
        raise
    except BaseException as exc:  # a library written in Rust panics with no Exception
        if _can_be_called(task, args, kwargs):
            _warn(task.name, f"raised {exc!r:.200}")
        return headers.DEFAULT_WORKLOAD
    workload = headers.workload(answer)
    if workload is None:
        if inspect.iscoroutine(answer):
            answer.close()
        _warn(task.name, f"returned {answer!r:.100}")
        return headers.DEFAULT_WORKLOAD
    return workload


def _can_be_called(task: Any, args: Any, kwargs: Any) -> bool:
    """Whether the arguments are not to blame: Celery is about to refuse the call for them."""
    try:
        task.check_arguments(args, kwargs)
    except TypeError:
        return False
    return True


def _warn(task_name: str, what: str) -> None:
    if task_name in _warned:
        return
    _warned.add(task_name)
    logger.warning(
        "workload_calculator of %s %s: the workload of an input is a number from 0 to %g. It "
        "counts as %g now, and whenever this happens again",
        task_name,
        what,
        headers.MOST_WORKLOAD,
        headers.DEFAULT_WORKLOAD,
    )


def _require_room(task: Any, options: dict[str, Any], limit: float) -> None:
    if not _is_alone(options) or options.get("countdown") or options.get("eta"):
        return
    queue = getattr(options.get("queue"), "name", options.get("queue"))
    if not isinstance(queue, str) or task.app.conf.task_always_eager:
        return
    estimate = wait_estimates.of(task.app).estimate(queue)
    if estimate is not None and estimate > limit:
        raise errors.QueueTimeExceeded(task.name, queue, limit, estimate)


def _is_alone(options: dict[str, Any]) -> bool:
    """Whether it is a call of its own: who makes it can be told, and nothing is half sent."""
    if any(options.get(name) for name in _IN_CANVAS):
        return False
    return not (options.get("task_id") and get_current_task() is not None)


def _settings_of(app: Any) -> conf.Settings:
    settings = _settings.get(app)
    if settings is None:
        settings = _settings[app] = conf.read(app.conf)
    return settings
