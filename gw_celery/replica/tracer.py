"""Run Celery's tracer, unmodified, for the inputs of a replica.

An asynchronous body has its tracer in a greenlet on the loop; a synchronous one, or one with hooks
and receivers that could block, in a thread. Either way the outcome is reported in a few words.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

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
    batch_items,
    django_connections,
    greenlet_bridge,
    offload,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Bodies beyond this many bytes are decoded in a thread.
_LARGE = 64 * 1024
_LONGEST_TEXT = 4096
_LONGEST_TRACEBACK = 64 * 1024


class Inputs:
    """The inputs that this replica holds.

    Args:
        app: the Celery app, with its tasks' tracers built.
        report: takes a report for the parent; on the loop.
        threads: how many synchronous bodies run at a time.
        around: calls what it is given, with whatever must surround work in a thread.
        early: records of what is acknowledged when it begins, where they are kept.
    """

    def __init__(
        self,
        app: Any,
        report: Callable[[tuple[Any, ...]], None],
        threads: int,
        around: Callable[..., Any],
        early: early_ack_records.Records | None = None,
    ) -> None:
        self._app = app
        self._report = report
        self._early = early
        self._max_queue_time = conf.read(app.conf).max_queue_time
        self._threads = offload.Offload("body", threads, around)
        self._shared = django_connections.Shared(app)
        self._held = replica_input.held
        # asyncio keeps only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, job: int, name: str, task_id: str, *message: Any) -> None:
        """Start one input: it is reported now and runs in the next turn of the loop.

        One that gathers with others for a batch is reported when that starts.
        """
        self._start(replica_input.InFlight(job, name, task_id, self._report), *message)

    def run_alone(self, job: int, name: str, task_id: str, *message: Any) -> None:
        """Start one input that may kill this process: it shares no call."""
        one = replica_input.InFlight(job, name, task_id, self._report)
        one.runs_alone = True
        self._start(one, *message)

    def _start(self, one: replica_input.InFlight, request: Any, *content: Any) -> None:
        self._held[one.job] = one
        task = self._app.tasks.get(one.name)
        if (limit := self._queue_time(task)) is not None:
            one.judge = functools.partial(queue_time.rejection, one.name, request, limit)
        if _gathers(task):
            one.expires = queue_time.expiry(self._app, request)
        elif not self._is_early(one):
            one.begin()
        name = f"{one.name}[{one.task_id}]"
        task = asyncio.create_task(self._run(one, request, *content), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _queue_time(self, task: Any) -> float | None:
        """Seconds that an input of ``task`` may wait until it begins."""
        service = getattr(task, "gw_service", None)
        return None if service is None else service.max_queue_time(self._max_queue_time)

    def limit(self, job: int, seconds: float) -> None:
        if job in self._held:
            self._held[job].limit(seconds)

    def stop(self, job: int) -> None:
        if job in self._held:
            self._held[job].stop()

    async def _run(self, one: replica_input.InFlight, *message: Any) -> None:
        followed = task_context.bind()
        replica_input.current.set(one)
        batch_items.joining.set(one)
        try:
            report = await self._outcome(one, *message)
        except BaseException as exc:
            report = self._escaped(one, exc)
        finally:
            followed.end()
            self._held.pop(one.job, None)
        if self._early is not None:
            self._early.end(one.job)
        if report[0] != frames.Report.GONE:
            one.begin()  # unless it has: an error of what could not be read is no start
        self._report(report)

    async def _outcome(
        self, one: replica_input.InFlight, request: Any, body: Any, *content: Any
    ) -> tuple[Any, ...]:
        arguments = await self._decoded(body, *content)
        if self._early is not None and self._is_early(one):
            # The parent acknowledges it when it hears of the start: not before it is on record.
            record = functools.partial(self._early.begin, one, request, arguments)
            if _gathers(self._app.tasks.get(one.name)):
                one.record = record
            else:
                await record()
                one.begin()
                await asyncio.sleep(0)  # the report is sent: the body may block the loop
        one.is_traced = True
        run = functools.partial(
            trace.fast_trace_task, one.name, one.task_id, request, arguments, None, None
        )
        failed, answer, runtime = await self.called(one, run)
        if failed:
            return _error(one.job, _unwrapped(answer.exception), safe_str(answer.traceback))
        return (
            frames.Report.DONE,
            one.job,
            _cut(str(answer), _LONGEST_TEXT),
            float(runtime or 0.0),
        )

    async def called(self, one: replica_input.InFlight, run: Callable[[], T]) -> T:
        """Return ``run()`` from where the tracer of an input runs: on the loop, or in a thread."""
        if not greenlet_bridge.runs_on_loop(self._app.tasks.get(one.name)):
            return await self._threads.run(run)
        await self._shared.look()
        one.task = asyncio.current_task()
        return await greenlet_bridge.step(run, one)

    def _is_early(self, one: replica_input.InFlight) -> bool:
        return self._early is not None and self._early.has(one.name)

    async def _decoded(self, body: Any, content_type: Any, content_encoding: Any) -> Any:
        if not content_type:
            return body
        accept = trace._localized[1]
        load = functools.partial(
            kombu.serialization.loads, body, content_type, content_encoding, accept=accept
        )
        return load() if len(body) <= _LARGE else await self._threads.run(load)

    def _escaped(self, one: replica_input.InFlight, exc: BaseException) -> tuple[Any, ...]:
        """The report of what no tracer caught.

        The tracer stores whatever a body raises, so that what comes out of it is a failed store.
        """
        if isinstance(exc, execution.Stopped | asyncio.CancelledError):
            return (frames.Report.GONE, one.job)
        if isinstance(exc, SystemExit | KeyboardInterrupt):
            return _report_error(one.job, frames.Outcome.EXIT, exc, _exit_text(exc), "")
        if isinstance(exc, Reject):
            return _error(one.job, exc, "")
        outcome = frames.Outcome.UNSTORED if one.is_traced else frames.Outcome.INTERNAL
        logger.error("task %s[%s]: %s", one.name, one.task_id, outcome.value, exc_info=exc)
        return _report_error(one.job, outcome, exc, safe_repr(exc), "")


def prepare(app: Any, hostname: str) -> None:
    """Build the tracer of every task, its body open to limits."""
    for name, task in app.tasks.items():
        task_context.follow_requests(task)
        task.run = replica_input.open_body(task.run)
        task.__trace__ = trace.build_tracer(name, task, app.loader, hostname, app=app)


def _gathers(task: Any) -> bool:
    """Whether an input of ``task`` waits for others before it starts."""
    method = getattr(task, "gw_method", None)
    return method is not None and method.batched is not None


def _error(job: int, exc: BaseException, traceback: str) -> tuple[Any, ...]:
    if isinstance(exc, Retry):
        shown = exc.exc if exc.exc is not None else exc
        return _report_error(job, frames.Outcome.RETRY, exc, safe_repr(shown), traceback)
    if isinstance(exc, Reject):
        return _report_error(job, frames.Outcome.REJECT, exc, safe_repr(exc), traceback)
    outcome = frames.Outcome.IGNORE if isinstance(exc, Ignore) else frames.Outcome.FAILURE
    return _report_error(job, outcome, exc, safe_repr(exc), traceback)


def _unwrapped(exc: BaseException) -> BaseException:
    """Billiard wraps an exception to carry its traceback through a pickle."""
    return exc.exc if isinstance(exc, ExceptionWithTraceback) else exc


def _report_error(
    job: int, outcome: frames.Outcome, exc: BaseException, text: str, traceback: str
) -> tuple[Any, ...]:
    # Subclasses, such as numpy's, mean the same: the process is out of memory.
    kind = MemoryError if isinstance(exc, MemoryError) else type(exc)
    return (
        frames.Report.ERROR,
        job,
        outcome,
        f"{kind.__module__}.{kind.__qualname__}",
        _cut(text, _LONGEST_TEXT),
        _cut(_message(exc), _LONGEST_TEXT),
        _cut(traceback, _LONGEST_TRACEBACK),
        bool(getattr(exc, "requeue", False)),
    )


def _message(exc: BaseException) -> str:
    """What was given to the exception: the texts of these two put a prefix before it."""
    given: Any = exc
    if isinstance(exc, Reject):
        given = exc.reason
    elif isinstance(exc, Retry):
        given = exc.message or ""
    try:
        return str(given)
    except Exception:  # the user's own __str__
        return object.__repr__(given)


def _exit_text(exc: BaseException) -> str:
    return f"exitcode {exc.code}" if isinstance(exc, SystemExit) else repr(exc)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
