"""The slot of the sweeps: one thread of the worker itself, where no replica has to be READY.

A body that broadcasts may wait for the broker, so that it must not run in the worker's loop; what
Celery is told of it must be told there, for acknowledgements are not thread-safe.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError

from gw_celery import errors
from gw_celery.pool import request as pool_request

logger = logging.getLogger(__name__)

#: Sweeps that may wait; each stands for all before it.
_LONGEST_QUEUE = 4
#: Seconds that the end of a worker waits for one that is running.
_FAREWELL = 2.0


class Lane:
    """Runs one sweep at a time; the thread starts with the first.

    Args:
        wake: has the worker's loop call ``settle`` soon; from any thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._orders: queue.Queue[_Order | None] = queue.Queue(_LONGEST_QUEUE)
        self._answers: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()

    def submit(
        self, target: Callable[..., Any], args: Any, options: dict[str, Any]
    ) -> pool_request.PoolRequest:
        """Take one sweep; ``target`` is Celery's tracer, as for every pool."""
        job = pool_request.PoolRequest(0, tuple(args), "", options, None)
        job.tell_accepted(os.getpid(), pool_request.now())
        try:
            self._orders.put_nowait((target, job))
        except queue.Full:
            job.tell_broken(errors.SweepDropped(job.name, _LONGEST_QUEUE))
        else:
            self._start()
        return job

    def settle(self) -> None:
        """Tell Celery what has ended; in the worker's loop."""
        while self._answers:
            self._answers.popleft()()

    def close(self) -> None:
        """End the thread; what waits is lost, as any later tick does its work."""
        if self._thread is None:
            return
        self._is_over.set()
        with contextlib.suppress(queue.Full):  # then it looks at the event after the next one
            self._orders.put_nowait(None)
        self._thread.join(_FAREWELL)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gw-sweeps", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None and not self._is_over.is_set():
            self._answers.append(_carried_out(*order))
            self._wake()


_Order = tuple[Callable[..., Any], pool_request.PoolRequest]


def _carried_out(target: Callable[..., Any], job: pool_request.PoolRequest) -> Callable[[], None]:
    """Run a sweep; returns what tells Celery of it."""
    name, task_id, request = job.args[:3]
    try:
        # Called without arguments whatever its message says: nothing is decoded in the parent.
        failed, answer, runtime = target(name, task_id, request, ([], {}, None), None, None)
    except BaseException as exc:  # the thread outlives it
        # As Celery's own pools tell of an exit, which must end nobody here.
        lost = exc if isinstance(exc, Exception) else WorkerLostError(repr(exc))
        return lambda: job.tell_broken(lost)
    if isinstance(answer, ExceptionInfo) and failed:
        return lambda: job.tell_failed(answer, runtime)
    return lambda: job.tell_done(str(answer), runtime)
