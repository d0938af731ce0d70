"""Runs the benchmarks of a child's tasks, through the real path of an input without the tracer.

The tracer would store results and send events, which must not happen. Everything else is real: the
greenlet or thread, the wrappers of ``run``, limits, instances and batches.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from celery import _state
from celery.app.task import Context

from gw_celery import conf, errors
from gw_celery.client import execution, task_context
from gw_celery.declare import services
from gw_celery.policy import scores
from gw_celery.protocol import frames, headers, snapshot
from gw_celery.replica import tracer
from gw_celery.runtime import batcher, loop

logger = logging.getLogger(__name__)

#: Seconds for stopping, in addition to the time that inputs may take to end.
_MARGIN = 1.0


class Benchmarks:
    """The benchmarks of a replica's tasks; on its loop.

    Args:
        app: the Celery app, prepared by ``tracer.prepare``.
        inputs: the inputs of this replica.
        link: the connection to the parent.
    """

    def __init__(self, app: Any, inputs: tracer.ReplicaInputs, link: tracer.Link) -> None:
        self._app = app
        self._grace = conf.read(app.conf).cancel_timeout
        self._inputs = inputs
        self._link = link
        self._tasks = loop.Tasks()

    def start(self, number: int, name: str, within: float, is_again: bool) -> None:
        """Measure a task, and report its score or the reason for its absence.

        Args:
            number: the number of the order, for the report.
            name: the name of the task.
            within: seconds that the benchmark may take.
            is_again: whether this replica has been READY before.
        """
        answer = self._answer(number, name, within, is_again)
        self._tasks.start(answer, f"benchmark of {name}")

    async def stop(self) -> None:
        """End a running benchmark, because the replica leaves."""
        if tasks := self._tasks.cancel():
            await asyncio.wait(tasks, timeout=self._grace + _MARGIN)

    async def _answer(self, number: int, name: str, within: float, is_again: bool) -> None:
        answer: dict[str, Any]
        try:
            score = await self._measure(name, within, is_again)
            answer = {"score": dataclasses.asdict(score)}
        except scores.NoScore as exc:
            answer = {"failure": errors.text_of(exc)}
        except Exception as exc:  # an error of ours must not leave the parent waiting
            logger.exception(
                "pid %d: the benchmark of task %s failed: report this bug", os.getpid(), name
            )
            answer = {"failure": errors.titled(exc)}
        self._link.report(frames.Report.MEASURED, number, json.dumps(answer))

    async def _measure(self, name: str, within: float, is_again: bool) -> snapshot.TaskScore:
        task = self._app.tasks.get(name)
        if getattr(task, "gw_method", None) is None:
            raise scores.NoScore("no task of this name is served here")
        logger.info("pid %d: the benchmark of task %s begins", os.getpid(), name)
        measurement = _Measurement(task, self._inputs, self._grace)
        bound = asyncio.timeout(within)
        try:
            async with bound:
                await measurement.run_round()  # warm-up, not counted
                rounds = [await measurement.run_round() for _ in range(measurement.source.runs)]
        except TimeoutError as exc:
            if not bound.expired():
                raise
            if is_again and measurement.is_stuck:  # otherwise the parent ends this process anyway
                self._link.report(frames.Report.STUCK, name)
            raise scores.NoScore(
                f"it was not over after {within:.0f} s (setting gw_benchmark_timeout)"
            ) from exc
        score = scores.of(name, rounds)
        logger.info("pid %d: the score of task %s is %.4g/s", os.getpid(), name, score.value)
        return score


@dataclasses.dataclass
class _Call:
    """One input of a round, and its outcome."""

    input: tracer.Input
    kwargs: dict[str, Any]
    workload: float
    began: float = 0.0
    ended: float = 0.0
    failure: str | None = None

    def stop(self, limit: float) -> None:
        """End the input at its time limit."""
        self.failure = f"TimeLimitExceeded: {limit:g} s"
        self.input.stop()


class _Measurement:
    """The benchmark of one task; stopped inputs have ``grace`` seconds to end."""

    def __init__(self, task: Any, inputs: tracer.ReplicaInputs, grace: float) -> None:
        self._task = task
        self._inputs = inputs
        self._grace = grace
        self._method: services.Method = task.gw_method
        if self._method.benchmark is None:
            raise scores.NoScore(f"{task.name} declares no benchmark")
        self.source = self._method.benchmark
        most: int = task.gw_service.max_inputs
        #: Number of inputs that a round starts together: the benchmark's concurrency, limited by
        #: the replica's slots. Batches are measured full.
        self._parallel = min(self.source.concurrency, most)
        if self._method.batched is not None:
            size = self._method.batched.max_batch_size
            self._parallel = min(-(-self.source.concurrency // size), most // size) * size
        # A fixed seed, so that two measurements have the same inputs.
        self._random = random.Random(task.name)
        self._has_logged = self._has_warned = False
        #: Whether a stopped input continues and cannot be ended.
        self.is_stuck = False

    async def run_round(self) -> scores.Round:
        """Run the inputs of one round together; a cancellation stops those that still run."""
        calls = await loop.in_thread(self._draw)
        tasks = [asyncio.create_task(self._run(call)) for call in calls]
        try:
            await asyncio.wait(tasks)
            for task in tasks:
                task.result()
        finally:
            # After a timeout, stop the inputs in the same way as revoked ones.
            if left := [task for task in tasks if not task.done()]:
                for call in calls:
                    call.input.stop()
                _, going_on = await asyncio.wait(left, timeout=self._grace)
                self.is_stuck = bool(going_on)
        succeeded = [call for call in calls if call.failure is None]
        failures = [call.failure for call in calls if call.failure is not None]
        return scores.Round(
            elapsed=max(call.ended for call in calls) - min(call.began for call in calls),
            workload=sum(call.workload for call in succeeded),
            latencies=tuple(call.ended - call.began for call in succeeded),
            failures=len(failures),
            failure=failures[0] if failures else "",
        )

    async def _run(self, call: _Call) -> None:
        # This runs as a separate asyncio task, so that its context belongs to the input.
        followed = task_context.bind()
        tracer.current.set(call.input)
        batcher.joining.set(call.input)
        # Enforce the task's limits, as the worker does in traffic.
        soft, hard = self._task.soft_time_limit, self._task.time_limit
        later = asyncio.get_running_loop().call_later
        limits = [later(soft, call.input.limit, soft)] if soft else []
        limits += [later(hard, call.stop, hard)] if hard else []
        call.began = time.perf_counter()
        try:
            await self._inputs.call(call.input, lambda: self._call_body(call))
        except (Exception, execution.Stopped) as exc:
            call.failure = call.failure or errors.titled(exc)
            if not self._has_logged:
                self._has_logged = True
                logger.warning(
                    "an input of the benchmark of task %s failed", self._task.name, exc_info=exc
                )
        finally:
            call.ended = time.perf_counter()
            followed.end()
            for limit in limits:
                limit.cancel()

    def _call_body(self, call: _Call) -> Any:
        """Call ``run`` of the task with a new request on Celery's stacks.

        The request counts as called directly: ``retry()`` raises its cause and sends nothing.
        """
        id_, task = call.input.task_id, self._task
        _state._task_stack.push(task)
        task.request_stack.push(Context(id=id_, task=task.name, args=(), kwargs=call.kwargs))
        try:
            return task.run(**call.kwargs)
        finally:
            task.request_stack.pop()
            _state._task_stack.pop()

    # -- inputs --

    def _draw(self) -> list[_Call]:
        """Draw the inputs of one round; in a thread, because the generator may block."""
        if (generator := self.source.generator) is None:
            drawn = self._random.choices(self.source.dataset, k=self._parallel)
            samples = [dict(copy.deepcopy(sample)) for sample in drawn]  # a body may change it
        else:
            samples = [self._generate(generator) for _ in range(self._parallel)]
        name = self._task.name
        return [
            _Call(tracer.Input(0, name, str(uuid.uuid4()), None), sample, self._workload(sample))
            for sample in samples
        ]

    def _generate(self, generator: Callable[[], Any]) -> dict[str, Any]:
        name = f"benchmark_generator of {self._task.name}"
        try:
            sample = generator()
        except BaseException as exc:  # this thread gets no interruptions from outside
            raise scores.NoScore(f"{name} raised {errors.titled(exc)}") from exc
        if not isinstance(sample, Mapping):
            raise scores.NoScore(
                f"{name} returned {sample!r:.100}: it must return a dict of parameter names"
            )
        try:
            self._method.signature.bind(**sample)
        except TypeError as exc:
            raise scores.NoScore(
                f"{name} returned {dict(sample)!r:.100}, whose keys must match the parameters "
                f"{self._method.signature}: {exc}"
            ) from exc
        return dict(sample)

    def _workload(self, kwargs: dict[str, Any]) -> float:
        calculator = self._method.workload_calculator
        if calculator is None:
            return headers.DEFAULT_WORKLOAD
        try:
            answer = calculator(**kwargs)
            if (workload := headers.workload(answer)) is not None:
                return workload
            what = f"returned {answer!r:.100}"
        except BaseException as exc:  # callers count such an input as the default too
            what = f"raised {exc!r:.200}"
        # A calculator may work with positional arguments and fail with these keyword arguments.
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "task %s: its workload_calculator %s for a sample of the benchmark; an input of "
                "unknown workload counts as %g, and the score is not in the unit of the traffic. "
                "Let it take the parameters of the task by name",
                *(self._task.name, what, headers.DEFAULT_WORKLOAD),
            )
        return headers.DEFAULT_WORKLOAD
