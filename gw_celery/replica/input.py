"""One input of a replica, and how a limit or a revocation reaches its body only."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import datetime as dt
import enum
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from celery.exceptions import SoftTimeLimitExceeded

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.protocol import frames
from gw_celery.replica import queue_time
from gw_celery.runtime import body

if TYPE_CHECKING:
    from gw_celery.replica import early_ack_records

#: The input whose tracer runs in this context.
current: contextvars.ContextVar[Input | None] = contextvars.ContextVar("gw_input", default=None)

#: The inputs that this process holds, by their number.
in_flight: dict[int, Input] = {}


class Link(Protocol):
    """The way to the parent."""

    def report(self, kind: frames.Report, *content: Any) -> None: ...


class Phase(enum.Enum):
    """Whether something may be raised in an input."""

    #: Not yet: what comes now is raised when its tracer reaches the body.
    BEFORE = enum.auto()
    #: Yes. A batched input may wait in here for its batch, and has not begun.
    BODY = enum.auto()
    #: Not any more: its tracer stores the result.
    AFTER = enum.auto()


@dataclasses.dataclass(eq=False, repr=False)
class Input:
    """An input between its arrival in the replica and its answer.

    What is raised from outside is raised between the start and the end of the body, never while
    Celery's tracer stores a result.
    """

    number: int
    name: str
    task_id: str
    #: ``None`` for the input of a benchmark, of which nothing outside this process may learn.
    link: Link | None
    _: dataclasses.KW_ONLY
    #: The headers of its message.
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: It was in flight when a child died, and waits for no other input.
    runs_alone: bool = False
    #: It waits for others, to begin in a batch with them.
    gathers: bool = False
    #: When its answer is not wanted any more, unless it has begun.
    expires: dt.datetime | None = None
    #: Seconds that it may wait until it begins.
    max_queue_time: float | None = None
    #: Where it must be recorded before it begins; ``None`` when it needs no record, or has one.
    records: early_ack_records.Records | None = None
    #: What the body of its message holds, for that record.
    arguments: Any = None
    #: What fails it in place of its body.
    rejection: Exception | None = None
    #: The parent was told that it begins.
    has_begun: bool = False
    #: Its message could be read, and Celery's tracer has taken over.
    is_traced: bool = False
    #: Why a write of its tracer to the result backend was given up.
    store_error: Exception | None = None
    #: The asyncio task that runs the tracer; ``None`` while a thread does.
    task: asyncio.Task[Any] | None = None
    phase: Phase = Phase.BEFORE

    def __post_init__(self) -> None:
        self._thread = 0
        self._thrown: body.Thrown | None = None
        self._instead: BaseException | None = None
        self._is_stopped = False
        # Reentrant: an exception raised in this thread can interrupt `_leave_body` itself.
        self._lock = threading.RLock()

    @property
    def is_benchmark(self) -> bool:
        return self.link is None

    def record_early_ack(self) -> Awaitable[None] | None:
        """Write the record that must be there before an early acknowledgement, once."""
        records, self.records = self.records, None
        arguments, self.arguments = self.arguments, None
        return None if records is None else records.begin(self, self.request, arguments)

    def begin(self) -> bool:
        """Report that the input begins, once; return whether its answer is still wanted.

        Limits count from here, and an early acknowledgement happens here: an input that waits for
        its batch has not begun.
        """
        if self.has_begun or self._is_stopped:
            return not self._is_stopped
        if queue_time.has_expired(self.expires):
            self._report(frames.Report.EXPIRED, self.number)
            self.stop()
            return False
        self.has_begun = True
        self._report(frames.Report.ACCEPT, self.number, time.monotonic())
        # Celery's tracer stores a rejection as any failure: callbacks and chords learn of it, and
        # nothing that waits for the result backend is in the worker's loop.
        self.rejection = self._check_queue_time()
        if self.rejection is not None:
            self.stop()
        return self.rejection is None

    def _check_queue_time(self) -> Exception | None:
        if self.max_queue_time is None:
            return None
        return queue_time.rejection(self.name, self.request, self.max_queue_time)

    def _report(self, kind: frames.Report, *content: Any) -> None:
        if self.link is not None:
            self.link.report(kind, *content)

    def run_body(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the body, open to what is raised from outside."""
        try:
            self._enter_body()
            with body.Contained():  # of the project's other tasks, too
                answer = run(*args, **kwargs)
        except (asyncio.CancelledError, execution.Revoked) as exc:
            if self.rejection is not None:
                raise self.rejection from None
            if self._is_stopped or isinstance(exc, execution.Revoked):
                raise execution.Revoked from None
            if execution.current() is None:  # it ends, and the broker has the message still
                raise
            reason = "the body cancelled its own task; raise an Exception to fail it"
            raise errors.BodyExited(reason) from exc
        finally:
            try:
                self._leave_body()
            finally:
                self.phase = Phase.AFTER
        if self._is_stopped:  # it swallowed the cancellation; its answer is not wanted
            raise execution.Revoked
        return answer

    def limit(self, seconds: float) -> None:
        """Raise ``SoftTimeLimitExceeded`` in the body."""
        self._raise(SoftTimeLimitExceeded(seconds))

    def stop(self) -> None:
        """Cancel the body, once; its answer is not wanted any more."""
        if not self._is_stopped:
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
            if self.phase is Phase.BEFORE:
                self._instead = exc
            elif self.phase is Phase.BODY:
                self._raise_in_body(exc)

    def _raise_in_body(self, exc: BaseException | None) -> None:
        if self.task is not None:
            self._instead = exc
            self.task.cancel()
        else:
            self._thrown = body.Thrown(
                self._thread, execution.Revoked if exc is None else type(exc)
            )

    def _enter_body(self) -> None:
        with self._lock:
            self._thread = threading.get_ident()
            self.phase = Phase.BODY
            instead, self._instead = self._instead, None
        if self._is_stopped or instead is not None:
            raise instead or execution.Revoked()

    def _leave_body(self) -> None:
        with self._lock:
            self.phase = Phase.AFTER
            if self.task is not None and self._is_stopped:
                self.task.uncancel()
        if self._thrown is not None:
            self._thrown.wait()


def others_in_flight() -> bool:
    """Whether more than one input is in flight in this process."""
    return len(in_flight) > 1


def is_benchmark() -> bool:
    """Whether what runs in this context is the input of a benchmark."""
    input = current.get()
    return input is not None and input.is_benchmark


def open_body(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the ``run`` of a task, so that limits reach it; a nested call is part of its caller."""

    @functools.wraps(run)
    def opened(*args: Any, **kwargs: Any) -> Any:
        input = current.get()
        if input is None or input.phase is not Phase.BEFORE:
            return run(*args, **kwargs)
        return input.run_body(run, args, kwargs)

    return opened
