"""Runs Celery's tracer, unmodified, for the inputs of a child.

The tracer of an asynchronous or batched body runs in a greenlet on the loop, unless hooks or
receivers may block. Any other tracer runs in a thread. The child reports the outcome to the parent.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import datetime as dt
import enum
import functools
import logging
import reprlib
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import kombu.serialization
from billiard.einfo import ExceptionWithTraceback
from celery.app import trace
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.utils.encoding import safe_str

from gw_celery import codec, conf, errors
from gw_celery.client import execution, task_context
from gw_celery.protocol import frames, headers
from gw_celery.runtime import (
    batcher,
    body,
    django_connections,
    greenlet_bridge,
    loop,
)
from gw_celery.transport import refusals

T = TypeVar("T")

logger = logging.getLogger(__name__)

_LONGEST_LINKS = 1024 * 1024
#: The content types whose links the parent reads itself.
_JSON = (codec.CONTENT_TYPE, "application/json")
#: A body with more bytes than this is decoded in a thread.
_LARGE = 64 * 1024
_OUTCOMES: dict[type[Exception], frames.Outcome] = {
    Retry: frames.Outcome.RETRY,
    Reject: frames.Outcome.REJECT,
    Ignore: frames.Outcome.IGNORE,
}

#: Parts of a request that Celery's tracer publishes when the body has ended.
_ANNOUNCED = ("callbacks", "errbacks", "chain", "chord")

#: The input whose tracer runs in this context.
current: contextvars.ContextVar[Input | None] = contextvars.ContextVar("gw_input", default=None)

#: The inputs of the parent in this process, by number; those of benchmarks are not in it.
in_flight: dict[int, Input] = {}


class Link(Protocol):
    def report(self, kind: frames.Report, *content: Any) -> None: ...


class Records(Protocol):
    """Records of early acknowledged inputs, for other workers."""

    async def begin(self, input: Input, arguments: Any) -> None: ...
    def end(self, input: Input) -> None: ...


class Phase(enum.Enum):
    """Whether an exception from outside may be raised in an input."""

    #: Not yet: it is raised when the tracer reaches the body.
    BEFORE = enum.auto()
    #: Yes. A batched input that waits for its batch is in this phase too.
    BODY = enum.auto()
    #: No: the tracer stores the result.
    AFTER = enum.auto()


@dataclasses.dataclass(eq=False, repr=False)
class Input:
    """An input between its arrival in the replica and its answer.

    Exceptions from outside are raised only inside the body, never while Celery's tracer stores a
    result.
    """

    number: int
    name: str
    task_id: str
    #: ``None`` for the input of a benchmark, which must have no effect outside this process.
    link: Link | None
    _: dataclasses.KW_ONLY
    #: The headers of its message.
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Whether it was in flight when a child died; then it must not share a batch.
    runs_alone: bool = False
    #: Whether it may wait for other inputs before it begins in a batch.
    gathers: bool = False
    #: Time after which the input must not begin.
    expires: dt.datetime | None = None
    #: Seconds that it may wait before it begins.
    max_queue_time: float | None = None
    #: Whether it is acknowledged at its start; then a record of it must be written before.
    acks_early: bool = False
    #: Writes that record; ``None`` if there is nothing to write.
    record: Callable[[], Awaitable[None]] | None = None
    #: The exception that is raised instead of running the body.
    rejection: Exception | None = None
    #: Whether its start was reported to the parent.
    has_begun: bool = False
    #: Whether its message was decoded, and Celery's tracer has started.
    is_traced: bool = False
    #: Whether its tracer has stored its outcome, and called its callbacks and its chord.
    is_answered: bool = False
    #: The reason why its tracer gave up a write to the result backend.
    store_error: Exception | None = None
    #: The asyncio task that runs the tracer; ``None`` in a thread.
    task: asyncio.Task[Any] | None = None
    phase: Phase = Phase.BEFORE

    def __post_init__(self) -> None:
        self._thread = 0
        self._thrown: body.Thrown | None = None
        self._instead: BaseException | None = None
        self._is_stopped = False
        # Reentrant: a thrown exception can interrupt `_leave_body` in the same thread.
        self._lock = threading.RLock()

    # -- the start --

    @property
    def was_dropped(self) -> bool:
        """Whether it was stopped before its start, so that another worker may run it."""
        return self._is_stopped and not self.has_begun

    def record_early_ack(self) -> Awaitable[None] | None:
        """Return the write of the record that an early acknowledgement needs, once."""
        record, self.record = self.record, None
        return None if record is None else record()

    def begin(self) -> bool:
        """Report the start of the input, once; return whether its answer is still wanted.

        Limits count from the start, and an early acknowledgement follows it. An input that waits
        for its batch has not begun.
        """
        if self.has_begun or self._is_stopped:
            return not self._is_stopped
        if self.expires is not None and dt.datetime.now(self.expires.tzinfo) > self.expires:
            self._report(frames.Report.EXPIRED, self.number)
            self.stop()
            return False
        self.has_begun = True
        self._report(frames.Report.ACCEPT, self.number, time.monotonic())
        # Celery's tracer stores a rejection like any failure: callbacks and chords get it, and the
        # worker's loop does not wait for the result backend.
        self.rejection = self._queue_time_exceeded()
        if self.rejection is not None:
            self.stop()
        return self.rejection is None

    def _queue_time_exceeded(self) -> errors.QueueTimeExceeded | None:
        if self.max_queue_time is None:
            return None
        delivery = self.request.get("delivery_info") or {}
        # A redelivered input may have run meanwhile: its queue time is unknown.
        if delivery.get("redelivered") or self.request.get("x-delivery-count"):
            return None
        waited = headers.waited(self.request, time.time())
        if waited <= self.max_queue_time:
            return None
        queue = str(delivery.get("routing_key") or "")
        return errors.QueueTimeExceeded(self.name, queue, self.max_queue_time, waited, True)

    def _report(self, kind: frames.Report, *content: Any) -> None:
        if self.link is not None:
            self.link.report(kind, *content)

    # -- the body --

    def run_body(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the body; exceptions from outside are raised only while it runs."""
        try:
            self._enter_body()
            with body.Contained():  # also for the project's plain tasks
                answer = run(*args, **kwargs)
        except (asyncio.CancelledError, execution.Revoked) as exc:
            if self.rejection is not None:
                raise self.rejection from None
            if self._is_stopped or isinstance(exc, execution.Revoked):
                raise execution.Revoked from None
            if execution.current() is None:  # the child ends, and the broker still has the message
                raise
            reason = "the body cancelled its own task: raise an Exception to fail it"
            raise errors.BodyExited(reason) from exc
        finally:
            try:
                self._leave_body()
            finally:
                self.phase = Phase.AFTER
        if self._is_stopped:  # the body ignored its cancellation
            raise execution.Revoked
        return answer

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

    def limit(self, seconds: float) -> None:
        self._raise(SoftTimeLimitExceeded(seconds))

    def stop(self) -> None:
        """Cancel the body, once; its answer is not wanted any more."""
        if not self._is_stopped:
            self._is_stopped = True
            self._raise(None)

    def take_interrupt(self) -> BaseException | None:
        """Return, once, the exception that replaces a cancellation of the body's coroutine."""
        instead, self._instead = self._instead, None
        if instead is not None and self.task is not None:
            self.task.uncancel()
        return instead

    def _raise(self, exc: BaseException | None) -> None:
        with self._lock:
            if self.phase is Phase.AFTER:
                return
            if self.phase is Phase.BEFORE or self.task is not None:
                self._instead = exc
            if self.phase is Phase.BODY and self.task is not None:
                self.task.cancel()
            elif self.phase is Phase.BODY:
                kind = execution.Revoked if exc is None else type(exc)
                self._thrown = body.Thrown(self._thread, kind)


def is_benchmark() -> bool:
    """Return whether this context belongs to the input of a benchmark."""
    input = current.get()
    return input is not None and input.link is None


def prepare(app: Any, hostname: str) -> None:
    """Build the tracer of every task, with a body that limits can reach."""
    for name, task in app.tasks.items():
        task_context.follow_requests(task)
        task.run = open_body(task.run, app)
        task.retry, task.replace = _fenced(task.retry, app), _fenced(task.replace, app)
        task.__trace__ = trace.build_tracer(name, task, app.loader, hostname, app=app)


def open_body(run: Callable[..., Any], app: Any) -> Callable[..., Any]:
    """Wrap a task's ``run`` so that limits reach it; a nested call is part of its caller.

    Celery's tracer publishes callbacks before it stores: check before that whether it may.
    """

    def announce(input: Input) -> None:
        if any(input.request.get(name) for name in _ANNOUNCED):
            _require_alive(app, input)

    @functools.wraps(run)
    def opened(*args: Any, **kwargs: Any) -> Any:
        input = current.get()
        if input is None or input.phase is not Phase.BEFORE:
            return run(*args, **kwargs)
        try:
            answer = input.run_body(run, args, kwargs)
        except Exception:
            announce(input)
            raise
        announce(input)
        return answer

    return opened


def _fenced(publish: Callable[..., Any], app: Any) -> Callable[..., Any]:
    """Wrap a method of a task that publishes the input again, or another in its place."""

    @functools.wraps(publish)
    def fenced(*args: Any, **kwargs: Any) -> Any:
        if (input := current.get()) is not None:
            _require_alive(app, input)
        return publish(*args, **kwargs)

    return fenced


def _require_alive(app: Any, input: Input) -> None:
    """Raise ``DeclaredLost`` if this worker was declared lost while it had the input."""
    if headers.hold_of(input.request) is not None:
        # A backend object of the project has no such method.
        getattr(app.backend, "require_alive", lambda request: None)(input.request)


class ReplicaInputs:
    """The inputs of this replica, on its loop; an input passes the methods in their order.

    Args:
        app: the Celery app, prepared by ``prepare``.
        link: the connection to the parent.
        threads: maximum number of synchronous bodies that run at a time.
        around: calls a function, with the setup that a thread needs.
        records: writes the records of early acknowledged inputs; ``None``: no input needs one.
    """

    def __init__(
        self,
        app: Any,
        link: Link,
        threads: int,
        around: Callable[..., Any],
        records: Records | None,
    ) -> None:
        self._app = app
        self._link = link
        self._records = records
        self._max_queue_time = conf.read(app.conf).max_queue_time
        self._threads = greenlet_bridge.Offload("body", threads, around)
        self._close_outdated = django_connections.closing_outdated(app)
        self._tasks = loop.Tasks()

    def start(
        self,
        number: int,
        name: str,
        task_id: str,
        request: Any,
        *content: Any,
        runs_alone: bool = False,
    ) -> None:
        """Start an input: report it now, and run it in the next turn of the loop.

        An input that waits for a batch, or for the record of its early acknowledgement, is reported
        later.

        Args:
            number: the number of the input in frames.
            name: the name of the task.
            task_id: the id of the input.
            request: the headers of the message.
            content: the body of the message, its content type and its encoding.
            runs_alone: whether the input may kill this process, and must not share a batch.
        """
        task = self._app.tasks.get(name)
        service, method = getattr(task, "gw_service", None), getattr(task, "gw_method", None)
        gathers = method is not None and method.batched is not None and not runs_alone
        expires: dt.datetime | None = None
        if gathers and (written := request.get("expires")):  # read as Celery does in the parent
            expires = maybe_make_aware(maybe_iso8601(written), self._app.timezone)
        input = Input(
            number,
            name,
            task_id,
            self._link,
            request=request,
            runs_alone=runs_alone,
            gathers=gathers,
            expires=expires,
            max_queue_time=service and (service.placement.max_queue_time or self._max_queue_time),
            acks_early=self._records is not None and task is not None and not task.acks_late,
        )
        in_flight[number] = input
        if not gathers and not input.acks_early:
            input.begin()
        self._tasks.start(self._run(input, *content), f"{name}[{task_id}]")

    async def _run(self, input: Input, *content: Any) -> None:
        followed = task_context.bind()
        current.set(input)
        batcher.joining.set(input)
        try:
            report = await self._outcome(input, *content)
        except BaseException as exc:
            report = await self._escaped(input, exc)
        finally:
            followed.end()
            in_flight.pop(input.number, None)
            # An asyncio task that the body leaves behind keeps this context: release the arguments.
            input.request = {}
        if input.acks_early and self._records is not None:
            self._records.end(input)
        if input.was_dropped:  # the tracer reports what it makes of a stop
            report = frames.Report.GONE, input.number
        elif report[0] != frames.Report.GONE:
            input.begin()  # for an input that failed before its start
        self._link.report(*report)

    async def _outcome(self, input: Input, *content: Any) -> tuple[Any, ...]:
        """Run the input, and return the report for the parent: its kind, then its content."""
        arguments = await self._decoded(*content)
        if (needed := self._needed_by_parent(input, arguments, content[1])) is not None:
            self._report_links(input, needed)
            await asyncio.sleep(0)  # send it before the body may end the process
        if input.acks_early and self._records is not None:
            input.record = functools.partial(self._records.begin, input, arguments)
        # The report of the start makes the parent acknowledge the message: write the record before.
        if not input.gathers and (recording := input.record_early_ack()) is not None:
            await recording
            input.begin()
            await asyncio.sleep(0)  # send the report before the body may block the loop
        input.is_traced = True
        message = input.name, input.task_id, input.request, arguments
        run = functools.partial(trace.fast_trace_task, *message, None, None)
        failed, answer, runtime = await self.call(input, run)
        if failed:
            exc = answer.exception
            if isinstance(exc, ExceptionWithTraceback):  # billiard's wrapper for pickling
                exc = exc.exc
            if isinstance(exc, errors.DeclaredLost):  # raised in the body
                raise exc
            return failure(input.number, exc, safe_str(answer.traceback))
        text = errors.cut(str(answer))
        return frames.Report.DONE, input.number, text, float(runtime or 0.0)

    def _needed_by_parent(self, input: Input, arguments: Any, content_type: Any) -> Any:
        """Return what Celery may need in the parent, which cannot read it in the body."""
        args, kwargs, links = arguments
        # Celery 5.7 sends such a task again when its child dies.
        if getattr(self._app.tasks.get(input.name), "retry_on_worker_lost", False):
            return {**(links or {}), "args": args, "kwargs": kwargs}
        is_unread = content_type and content_type not in _JSON
        return links if is_unread and any((links or {}).values()) else None

    def _report_links(self, input: Input, needed: Any) -> None:
        try:
            text = codec.dumps(needed)
            if len(text) > _LONGEST_LINKS:
                raise errors.SerializationError(f"they have over {_LONGEST_LINKS} characters")
            self._link.report(frames.Report.LINKS, input.number, text)
        except errors.SerializationError as exc:
            logger.warning(
                "task %s[%s]: its worker gets no links, for errbacks, chords and retries of a call "
                "that it ends itself: %s",
                *(input.name, input.task_id, exc),
            )

    async def _decoded(self, body: Any, content_type: Any, content_encoding: Any) -> Any:
        if not content_type:
            return _checked(body)
        load = functools.partial(_decode, body, content_type, content_encoding)
        return load() if len(body) <= _LARGE else await self._threads.run(load)

    async def call(self, input: Input, run: Callable[[], T]) -> T:
        """Run ``run`` where the input's tracer belongs: on the loop, or in a thread."""
        if not greenlet_bridge.runs_on_loop(self._app.tasks.get(input.name)):
            return await self._threads.run(run)
        if self._close_outdated is not None:
            await self._close_outdated()
        input.task = asyncio.current_task()
        return await greenlet_bridge.step(run, input.take_interrupt)

    async def _escaped(self, input: Input, exc: BaseException) -> tuple[Any, ...]:
        """Return the report of an exception that the tracer did not catch.

        The tracer stores what a body raises. What leaves it is a hook's exit, or a failed store. If
        only this outcome cannot be stored, a short failure is stored.
        """
        if isinstance(exc, execution.Stopped | asyncio.CancelledError):
            return frames.Report.GONE, input.number
        if isinstance(exc, errors.DeclaredLost):
            logger.warning("task %s[%s] is dropped: %s", input.name, input.task_id, exc.reason)
            return _error(input.number, frames.Outcome.FENCED, exc, "")
        if isinstance(exc, Reject):
            return failure(input.number, exc, "")
        if isinstance(exc, errors.UnreadableMessage) and not input.is_traced:
            return _error(input.number, frames.Outcome.UNREADABLE, exc, errors.repr_of(exc))
        is_outage = input.store_error is not None or refusals.is_outage(exc)
        if input.is_answered or (input.is_traced and not is_outage):
            try:
                short = not_stored(input.task_id, exc, "it left Celery's tracer")
                await self.call(input, functools.partial(self._store, input, short))
                # The worker replaces a child that is out of memory.
                told = exc if isinstance(exc, MemoryError) else short
                return failure(input.number, told, "")
            except Exception as unstored:
                exc = unstored
        outcome = frames.Outcome.UNSTORED if input.is_traced else frames.Outcome.INTERNAL
        what = "outcome could not be stored" if input.is_traced else "message could not be run"
        logger.error(
            "task %s[%s] has no result: its %s", input.name, input.task_id, what, exc_info=exc
        )
        return _error(input.number, outcome, exc, errors.repr_of(exc))

    def _store(self, input: Input, short: errors.OutcomeNotStored) -> None:
        task, request = self._app.tasks.get(input.name), Context(input.request)
        is_ignored = input.request.get("ignore_result", getattr(task, "ignore_result", False))
        stores = not is_ignored or task is None or task.store_errors_even_if_ignored
        self._app.backend.mark_as_failure(
            input.task_id, short, request=request, store_result=stores
        )

    def limit(self, number: int, seconds: float) -> None:
        if (input := in_flight.get(number)) is not None:
            input.limit(seconds)

    def stop(self, number: int) -> None:
        if (input := in_flight.get(number)) is not None:
            input.stop()

    def drop(self, number: int) -> None:
        if (input := in_flight.get(number)) is not None and not input.has_begun:
            input.stop()


# -- bodies --


def _decode(body: Any, content_type: str, content_encoding: Any) -> Any:
    """Return the arguments, keyword arguments and links of a call.

    Raises:
        UnreadableMessage: if the body is none.
    """
    try:
        if content_type == "application/json":
            codec.checked(body)
        call = kombu.serialization.loads(
            body, content_type, content_encoding, accept=trace._localized[1]
        )
    except MemoryError:
        raise
    except Exception as exc:
        reason = f"the body cannot be decoded: {errors.text_of(exc)}"
        raise errors.UnreadableMessage(reason) from exc
    return _checked(call)


def _checked(call: Any) -> Any:
    shape = tuple(map(type, call)) if isinstance(call, list | tuple) else ()
    if len(shape) != 3 or not (
        issubclass(shape[0], list | tuple)
        and issubclass(shape[1], dict)
        and issubclass(shape[2], dict | None)
    ):
        raise errors.UnreadableMessage(
            f"the body is {reprlib.repr(call)}: a call is [arguments, keyword arguments, options], "
            "a list and two mappings; correct what sends it"
        )
    return call


# -- reports of failures --


def failure(number: int, exc: BaseException, traceback: str) -> tuple[Any, ...]:
    """Return the report of a failure that the tracer has stored, or that the worker handles."""
    outcomes = (outcome for kind, outcome in _OUTCOMES.items() if isinstance(exc, kind))
    cause = exc.exc if isinstance(exc, Retry) and exc.exc is not None else exc
    outcome = next(outcomes, frames.Outcome.FAILURE)
    return _error(number, outcome, exc, errors.repr_of(cause), traceback)


def not_stored(task_id: str, error: Any, reason: str) -> errors.OutcomeNotStored:
    """Return the short error that is stored for ``error``, and log it."""
    if isinstance(error, errors.OutcomeNotStored):
        return error
    short = errors.OutcomeNotStored(type(error).__qualname__, reason, errors.text_of(error))
    logger.error("the outcome of input %s is cut: %s", task_id, short)
    return short


def _error(
    number: int, outcome: frames.Outcome, exc: BaseException, text: str, traceback: str = ""
) -> tuple[Any, ...]:
    # Subclasses, such as numpy's, have the same meaning: the process is out of memory.
    kind = MemoryError if isinstance(exc, MemoryError) else type(exc)
    # The original message, because the texts of Reject and Retry have a prefix.
    message: Any = exc
    if isinstance(exc, Reject):
        message = exc.reason
    elif isinstance(exc, Retry):
        message = exc.message or ""
    return (
        frames.Report.ERROR,
        number,
        outcome,
        f"{kind.__module__}.{kind.__qualname__}",
        errors.cut(text),
        errors.text_of(message),
        errors.cut_traceback(traceback),
        bool(getattr(exc, "requeue", False)),
    )
