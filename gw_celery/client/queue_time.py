"""Writes our message headers in a calling process, and refuses inputs that would wait too long."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import inspect
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from celery._state import get_current_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.time import maybe_iso8601, maybe_make_aware

from gw_celery import conf, errors
from gw_celery.client import execution
from gw_celery.protocol import headers
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: Options of tasks in a canvas, and of those that Celery sends itself. A refusal there would leave
#: a chord without end, or lose a retry or the rest of a chain.
_IN_CANVAS = ("group_id", "chord", "parent_id", "retries")

#: Seconds that a caller waits for Redis; after that it sends without an estimate.
_PATIENCE = 0.25
#: Maximum age in seconds of an estimate, or of the fact that there is none.
_FRESH = 1.0
#: Maximum age in seconds of an estimate on an event loop, where a thread refreshes it.
_USABLE = 5.0

#: Headers that belong to a single input, and must not be passed on.
_WRITTEN = (headers.WORKLOAD, headers.ENQUEUED)
#: Exceptions that interrupt the calling body, and are not the calculator's own.
_INTERRUPTS = (
    SoftTimeLimitExceeded,
    asyncio.CancelledError,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    execution.Stopped,
)

#: Tasks whose calculator this process has already warned about.
_warned: set[str] = set()
_settings: weakref.WeakKeyDictionary[Any, conf.Settings] = weakref.WeakKeyDictionary()


def prepared(task: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the ``options`` of ``apply_async`` with our headers.

    Raises:
        QueueTimeExceeded: if the input would wait longer than it may.
    """
    limit = task.gw_service.placement.max_queue_time or settings_of(task.app).max_queue_time
    ours = {}
    if limit is not None:
        _require_room(task, options, limit)
        ours[headers.ENQUEUED] = _starts_waiting(task.app, options)
    if (calculate := task.gw_method.workload_calculator) is not None:
        ours[headers.WORKLOAD] = _workload(task, calculate, args or (), kwargs or {})
    sent = options.get("headers") or {}
    # A retry carries the headers of the input that it repeats, and a body may pass headers on.
    kept = {key: sent[key] for key in sent if key not in _WRITTEN}
    if ours or len(kept) != len(sent):
        return {**options, "headers": {**kept, **ours}}
    return options


def _starts_waiting(app: Any, options: dict[str, Any]) -> float:
    """Return the Unix time from which an input waits: its ETA, or now.

    An ETA that Celery will refuse is ignored.
    """
    now = time.time()
    try:
        if countdown := options.get("countdown"):
            return now + max(0.0, float(countdown))
        if eta := options.get("eta"):
            at: dt.datetime = maybe_make_aware(maybe_iso8601(eta), app.timezone)
            return max(now, at.timestamp())
    except (TypeError, ValueError, AttributeError, OverflowError):
        pass
    return now


def _workload(task: Any, calculate: Callable[..., Any], args: Any, kwargs: Any) -> float:
    try:
        answer = calculate(*args, **kwargs)
    except _INTERRUPTS:
        raise
    except BaseException as exc:  # a panic of a Rust library is not an Exception
        with contextlib.suppress(TypeError):  # Celery will refuse such arguments itself
            task.check_arguments(args, kwargs)
            _warn(task.name, f"raised {exc!r:.200}")
        return headers.DEFAULT_WORKLOAD
    workload = headers.workload(answer)
    if workload is None:
        if inspect.iscoroutine(answer):
            answer.close()
        _warn(task.name, f"returned {answer!r:.100}")
        return headers.DEFAULT_WORKLOAD
    return workload


def _warn(task_name: str, what: str) -> None:
    if task_name in _warned:
        return
    _warned.add(task_name)
    logger.warning(
        "task %s: its workload_calculator %s; an input of unknown workload counts as %g. Return a "
        "number from 0 to %g",
        task_name,
        what,
        headers.DEFAULT_WORKLOAD,
        headers.MOST_WORKLOAD,
    )


def _require_room(task: Any, options: dict[str, Any], limit: float) -> None:
    if any(options.get(name) for name in (*_IN_CANVAS, "countdown", "eta")):
        return
    if options.get("task_id") and get_current_task() is not None:
        return  # it replaces the current task
    queue = getattr(options.get("queue"), "name", options.get("queue"))
    if not isinstance(queue, str) or task.app.conf.task_always_eager:
        return
    estimate = waits_of(task.app).estimate(queue)
    if estimate is not None and estimate > limit:
        raise errors.QueueTimeExceeded(task.name, queue, limit, estimate)


def settings_of(app: Any) -> conf.Settings:
    if app not in _settings:  # reading the settings takes as long as sending a call
        _settings[app] = conf.read(app.conf)
    return _settings[app]


class Waits:
    """The estimated waits in an app's queues, which workers publish."""

    def __init__(
        self, shared: find.SharedRedis | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._shared = shared
        self._now = now
        #: Queue -> (estimate, time of reading).
        self._estimates: dict[str, tuple[float | None, float]] = {}
        #: Held while a thread reads; other threads use the cached estimate meanwhile.
        self._reading = threading.Lock()
        self.pid = os.getpid()

    def estimate(self, queue: str) -> float | None:
        """Return the seconds that an input sent now would wait; ``None`` if unknown.

        On an event loop it returns the cached estimate, and a thread refreshes it.
        """
        estimate, at = self._estimates.get(queue, (None, -math.inf))
        age = self._now() - at
        if self._shared is None or age < _FRESH:
            return estimate
        if self._reading.acquire(blocking=False):
            if asyncio._get_running_loop() is None:
                return self._read(self._shared, queue)
            reads = (self._shared, queue)
            try:
                threading.Thread(
                    target=self._read, args=reads, name="gw-waits", daemon=True
                ).start()
            except RuntimeError:  # the process may have no more threads now
                self._reading.release()
                raise
        return estimate if age < _USABLE else None

    def _read(self, shared: find.SharedRedis, queue: str) -> float | None:
        estimate = None
        try:
            text = shared.client().get(shared.key("wait", queue))
            estimate = None if text is None else headers.workload(float(text))
        except Exception:  # Redis is away, or the value is no estimate: the call is admitted
            shared.close()
        finally:
            self._estimates[queue] = (estimate, self._now())
            self._reading.release()
        return estimate


_waits: weakref.WeakKeyDictionary[Any, Waits] = weakref.WeakKeyDictionary()


def waits_of(app: Any) -> Waits:
    """Return the estimates of ``app``, without connecting."""
    waits = _waits.get(app)
    if waits is None or waits.pid != os.getpid():  # a fork does not copy the reading thread
        waits = _waits[app] = Waits(find.redis_of(app, _PATIENCE))
    return waits
