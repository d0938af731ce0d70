"""One input that runs in a replica, and how a limit or a revocation reaches its body only."""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import enum
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.protocol import frames
from gw_celery.replica import queue_time
from gw_celery.runtime import async_exception, body, body_guard

#: The input whose tracer runs in this context.
current: contextvars.ContextVar[InFlight | None] = contextvars.ContextVar("gw_input", default=None)

#: The inputs that this process holds, by job number.
held: dict[int, InFlight] = {}


class _Phase(enum.Enum):
    BEFORE = enum.auto()
    BODY = enum.auto()
    AFTER = enum.auto()


class InFlight:
    """An input between its arrival in the replica and its answer.

    What is raised from outside is raised between the start and the end of the body, never while
    Celery's tracer stores a result.
    """

    def __init__(
        self, job: int, name: str, task_id: str, tell: Callable[[tuple[Any, ...]], None]
    ) -> None:
        self.job = job
        self.name = name
        self.task_id = task_id
        #: It was in flight when a child died, and waits for no other input.
        self.runs_alone = False
        #: When nobody wants its answer any more, unless it has begun.
        self.expires: dt.datetime | None = None
        #: Says why it has waited for too long, unless it has begun.
        self.judge: Callable[[], Exception | None] = _nothing
        #: What fails it in place of its body.
        self.refusal: Exception | None = None
        #: Writes the record of an early acknowledgement, where there is to be one.
        self.record: Callable[[], Awaitable[None]] | None = None
        #: It is a benchmark's: nothing outside this process may learn of it.
        self.is_unseen = False
        self._tell = tell
        #: The parent was told that it starts.
        self.has_begun = False
        #: Its message could be read, and Celery's tracer has taken over.
        self.is_traced = False
        #: Why a write of its tracer to the result backend was given up.
        self.store_error: Exception | None = None
        #: The asyncio task that runs the tracer; ``None`` while a thread does.
        self.task: asyncio.Task[Any] | None = None
        self._phase = _Phase.BEFORE
        self._thread = 0
        self._thrown: async_exception.Thrown | None = None
        self._instead: BaseException | None = None
        self._is_stopped = False
        # Reentrant: an exception raised in this thread can interrupt `_end` itself.
        self._lock = threading.RLock()

    def announce(self) -> Awaitable[None] | None:
        """Write the record that must be there before the input is acknowledged, once."""
        record, self.record = self.record, None
        return None if record is None else record()

    def begin(self) -> bool:
        """Tell the parent that the input starts, once; whether anybody still wants its answer.

        Limits count from here, and an early acknowledgement happens here: an input that waits for
        its batch has not started.
        """
        if self.has_begun or self._is_stopped:
            return not self._is_stopped
        if queue_time.has_expired(self.expires):
            self._tell((frames.Report.EXPIRED, self.job))
            self.stop()
            return False
        self.has_begun = True
        self._tell((frames.Report.ACCEPT, self.job, time.monotonic()))
        # Celery's tracer stores a refusal as any failure: callbacks and chords learn of it, and
        # nothing that waits for the result backend is in the worker's loop.
        if (refusal := self.judge()) is not None:
            self.refusal = refusal
            self.stop()
        return refusal is None

    @property
    def is_in_body(self) -> bool:
        return self._phase is _Phase.BODY

    def run_body(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the body, open to what is raised from outside."""
        try:
            self._begin()
            with body_guard.Contained():  # of the project's other tasks, too
                answer = run(*args, **kwargs)
        except (asyncio.CancelledError, execution.Revoked) as exc:
            if self.refusal is not None:
                raise self.refusal from None
            if self._is_stopped or isinstance(exc, execution.Revoked):
                raise execution.Revoked from None
            if execution.current() is None:  # it ends, and the broker has the message still
                raise
            reason = "the body cancelled its own task; raise an Exception to fail it"
            raise errors.BodyExited(reason) from exc
        finally:
            try:
                self._end()
            finally:
                self._phase = _Phase.AFTER
        if self._is_stopped:  # it swallowed the cancellation; nobody waits for its answer
            raise execution.Revoked
        return answer

    def limit(self, seconds: float) -> None:
        """Raise ``SoftTimeLimitExceeded`` in the body."""
        self._raise(SoftTimeLimitExceeded(seconds))

    def stop(self) -> None:
        """Cancel the body; its answer is not wanted any more."""
        self._is_stopped = True
        self._raise(None)

    def take_interrupt(self) -> BaseException | None:
        """Return what stands in for a cancellation that reaches the body's coroutine, once."""
        instead, self._instead = self._instead, None
        if instead is not None and self.task is not None:
            self.task.uncancel()
        return instead

    def _raise(self, exc: BaseException | None) -> None:
        with self._lock:
            if self._phase is _Phase.BEFORE:
                self._instead = exc
            elif self._phase is _Phase.BODY:
                self._raise_in_body(exc)

    def _raise_in_body(self, exc: BaseException | None) -> None:
        if self.task is not None:
            self._instead = exc
            self.task.cancel()
        elif not body.running.interrupt(self.task_id, exc):
            self._thrown = async_exception.Thrown(
                self._thread, execution.Revoked if exc is None else type(exc)
            )

    def _begin(self) -> None:
        with self._lock:
            self._thread = threading.get_ident()
            self._phase = _Phase.BODY
            instead, self._instead = self._instead, None
        if self._is_stopped or instead is not None:
            raise instead or execution.Revoked()

    def _end(self) -> None:
        with self._lock:
            self._phase = _Phase.AFTER
            if self.task is not None and self._is_stopped:
                self.task.uncancel()
        if self._thrown is not None:
            self._thrown.wait()


def _nothing() -> None:
    return None


def has_company() -> bool:
    """Whether more than one input is in flight in this process."""
    return len(held) > 1


def is_unseen() -> bool:
    """Whether what runs in this context is the input of a benchmark."""
    one = current.get()
    return one is not None and one.is_unseen


def open_body(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the ``run`` of a task, so that limits reach it; a nested call is part of its caller."""

    @functools.wraps(run)
    def opened(*args: Any, **kwargs: Any) -> Any:
        one = current.get()
        if one is None or one._phase is not _Phase.BEFORE:
            return run(*args, **kwargs)
        return one.run_body(run, args, kwargs)

    return opened
