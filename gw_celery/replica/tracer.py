"""Run Celery's tracer, unmodified, for the inputs of a replica.

An asynchronous body has its tracer in a greenlet on the loop; a synchronous one, or one with hooks
and receivers that could block, in a thread. Either way the outcome is reported in a few words.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import kombu.serialization
from billiard.einfo import ExceptionWithTraceback
from celery.app import trace
from celery.exceptions import Ignore, Reject, Retry
from kombu.utils.encoding import safe_repr, safe_str

from gw_celery import conf
from gw_celery.client import execution, task_context
from gw_celery.protocol import frames
from gw_celery.replica import early_ack_records, queue_time
from gw_celery.replica import input as replica_input
from gw_celery.runtime import (
    batcher,
    django_connections,
    greenlet_bridge,
    loop,
)

T = TypeVar("T")
#: A report for the parent: its kind, and what belongs to it.
Report: TypeAlias = tuple[Any, ...]

logger = logging.getLogger(__name__)

#: Bodies beyond this many bytes are decoded in a thread.
_LARGE = 64 * 1024
_LONGEST_TEXT = 4096
_LONGEST_TRACEBACK = 64 * 1024
_OUTCOMES: dict[type[Exception], frames.Outcome] = {
    Retry: frames.Outcome.RETRY,
    Reject: frames.Outcome.REJECT,
    Ignore: frames.Outcome.IGNORE,
}


class ReplicaInputs:
    """The inputs that this replica holds, in the order of their way; on its loop.

    Args:
        app: the Celery app, with its tasks' tracers built.
        link: the way to the parent.
        threads: how many synchronous bodies run at a time.
        around: calls what it is given, with whatever must surround work in a thread.
        records: of what is acknowledged when it begins, where they are kept.
    """

    def __init__(
        self,
        app: Any,
        link: replica_input.Link,
        threads: int,
        around: Callable[..., Any],
        records: early_ack_records.Records | None = None,
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
        """Start one input: it is reported now and runs in the next turn of the loop.

        One that waits for a batch, or for the record of its early acknowledgement, is reported
        when that is there.

        Args:
            number: of the input in the frames between parent and child.
            request: the headers of its message.
            content: the body of its message, its content type and its encoding.
            runs_alone: it may kill this process, and shares no call.
        """
        task = self._app.tasks.get(name)
        service, method = getattr(task, "gw_service", None), getattr(task, "gw_method", None)
        gathers = method is not None and method.batched is not None
        input = replica_input.Input(
            number,
            name,
            task_id,
            self._link,
            request=request,
            runs_alone=runs_alone,
            gathers=gathers,
            expires=queue_time.expiry(self._app, request) if gathers else None,
            max_queue_time=service and (service.placement.max_queue_time or self._max_queue_time),
            records=self._records if self._records and self._records.has(name) else None,
        )
        replica_input.in_flight[number] = input
        if not gathers and input.records is None:
            input.begin()
        self._tasks.start(self._run(input, *content), f"{name}[{task_id}]")

    async def _run(self, input: replica_input.Input, *content: Any) -> None:
        followed = task_context.bind()
        replica_input.current.set(input)
        batcher.joining.set(input)
        try:
            report = await self._outcome(input, *content)
        except BaseException as exc:
            report = _escaped(input, exc)
        finally:
            followed.end()
            replica_input.in_flight.pop(input.number, None)
            # A task that the body left behind keeps its context, but not the arguments in here.
            input.request = {}
        if self._records is not None:
            self._records.end(input.number)
        if report[0] != frames.Report.GONE:
            input.begin()  # unless it has: an error of what could not be read is no start
        self._link.report(*report)

    async def _outcome(self, input: replica_input.Input, *content: Any) -> Report:
        arguments = await self._decoded(*content)
        if input.records is not None:
            input.arguments = arguments
        # The parent acknowledges it when it hears of the start: not before it is on record.
        if not input.gathers and (recording := input.record_early_ack()) is not None:
            await recording
            input.begin()
            await asyncio.sleep(0)  # the report is sent: the body may block the loop
        input.is_traced = True
        message = input.name, input.task_id, input.request, arguments
        run = functools.partial(trace.fast_trace_task, *message, None, None)
        failed, answer, runtime = await self.call(input, run)
        if failed:
            return failure(input.number, _unwrapped(answer.exception), safe_str(answer.traceback))
        text = frames.cut(str(answer), _LONGEST_TEXT)
        return frames.Report.DONE, input.number, text, float(runtime or 0.0)

    async def _decoded(self, body: Any, content_type: Any, content_encoding: Any) -> Any:
        if not content_type:
            return body
        accept = trace._localized[1]
        load = functools.partial(
            kombu.serialization.loads, body, content_type, content_encoding, accept=accept
        )
        return load() if len(body) <= _LARGE else await self._threads.run(load)

    async def call(self, input: replica_input.Input, run: Callable[[], T]) -> T:
        """Return ``run()`` from where the tracer of an input runs: on the loop, or in a thread."""
        if not greenlet_bridge.runs_on_loop(self._app.tasks.get(input.name)):
            return await self._threads.run(run)
        if self._close_outdated is not None:
            await self._close_outdated()
        input.task = asyncio.current_task()
        return await greenlet_bridge.step(run, input.take_interrupt)

    def limit(self, number: int, seconds: float) -> None:
        """Raise a soft time limit in one input."""
        if (input := replica_input.in_flight.get(number)) is not None:
            input.limit(seconds)

    def stop(self, number: int) -> None:
        """Stop one input; its answer is not wanted any more."""
        if (input := replica_input.in_flight.get(number)) is not None:
            input.stop()


def prepare(app: Any, hostname: str) -> None:
    """Build the tracer of every task, its body open to limits."""
    for name, task in app.tasks.items():
        task_context.follow_requests(task)
        task.run = replica_input.open_body(task.run)
        task.__trace__ = trace.build_tracer(name, task, app.loader, hostname, app=app)


# -- what is reported of an input without a result --


def failure(number: int, exc: BaseException, traceback: str) -> Report:
    """Return the report of an outcome that Celery's tracer has stored, or left to the worker."""
    outcomes = (outcome for kind, outcome in _OUTCOMES.items() if isinstance(exc, kind))
    shown = exc.exc if isinstance(exc, Retry) and exc.exc is not None else exc
    outcome = next(outcomes, frames.Outcome.FAILURE)
    return _error(number, outcome, exc, safe_repr(shown), traceback)


def _escaped(input: replica_input.Input, exc: BaseException) -> Report:
    """The report of what no tracer caught.

    The tracer stores whatever a body raises, so that what comes out of it is a failed store.
    """
    if isinstance(exc, execution.Stopped | asyncio.CancelledError):
        return frames.Report.GONE, input.number
    if isinstance(exc, SystemExit | KeyboardInterrupt):
        text = f"exitcode {exc.code}" if isinstance(exc, SystemExit) else repr(exc)
        return _error(input.number, frames.Outcome.EXIT, exc, text)
    if isinstance(exc, Reject):
        return failure(input.number, exc, "")
    outcome = frames.Outcome.UNSTORED if input.is_traced else frames.Outcome.INTERNAL
    logger.error("task %s[%s]: %s", input.name, input.task_id, outcome.value, exc_info=exc)
    return _error(input.number, outcome, exc, safe_repr(exc))


def _unwrapped(exc: BaseException) -> BaseException:
    """Billiard wraps an exception to carry its traceback through a pickle."""
    return exc.exc if isinstance(exc, ExceptionWithTraceback) else exc


def _error(
    number: int, outcome: frames.Outcome, exc: BaseException, text: str, traceback: str = ""
) -> Report:
    # Subclasses, such as numpy's, mean the same: the process is out of memory.
    kind = MemoryError if isinstance(exc, MemoryError) else type(exc)
    return (
        frames.Report.ERROR,
        number,
        outcome,
        f"{kind.__module__}.{kind.__qualname__}",
        frames.cut(text, _LONGEST_TEXT),
        frames.cut(_message(exc), _LONGEST_TEXT),
        frames.cut(traceback, _LONGEST_TRACEBACK),
        bool(getattr(exc, "requeue", False)),
    )


def _message(exc: BaseException) -> str:
    """What was given to the exception: the texts of these two put a prefix before it."""
    message: Any = exc
    if isinstance(exc, Reject):
        message = exc.reason
    elif isinstance(exc, Retry):
        message = exc.message or ""
    try:
        return str(message)
    except Exception:  # the user's own __str__
        return object.__repr__(message)
