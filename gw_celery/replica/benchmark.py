"""Measures tasks of a replica, through all that a real input goes through but Celery's tracer.

The tracer stores results and announces them: without it nothing outside this process learns of an
input. Greenlet or thread, wrappers of ``run``, limits, instances and batches are the real ones.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from celery import _state
from celery.app.task import Context

from gw_celery import conf
from gw_celery.client import execution, task_context
from gw_celery.declare import markers, services
from gw_celery.policy import scores
from gw_celery.protocol import frames, headers, snapshot
from gw_celery.replica import input as replica_input
from gw_celery.replica import tracer
from gw_celery.runtime import batcher, loop

logger = logging.getLogger(__name__)

#: Characters of a failure that are reported.
_LONGEST = 1000


#: Seconds to stop in, over those that an input has to end.
_MARGIN = 1.0


class Benchmarks:
    """The benchmarks of a replica's tasks; on its loop.

    Args:
        app: the Celery app, with the bodies of its tasks open to limits.
        inputs: those of this replica.
        link: the way to the parent.
    """

    def __init__(self, app: Any, inputs: tracer.ReplicaInputs, link: replica_input.Link) -> None:
        self._app = app
        self._grace = conf.read(app.conf).cancel_timeout
        self._inputs = inputs
        self._link = link
        self._tasks = loop.Tasks()

    def start(self, number: int, name: str, within: float, is_again: bool) -> None:
        """Report the score of the task ``name``, or why there is none.

        Args:
            number: the answer is reported under it.
            name: of the task.
            within: seconds that it has.
            is_again: whether this replica has been READY before.
        """
        answer = self._answer(number, name, within, is_again)
        self._tasks.start(answer, f"benchmark of {name}")

    async def stop(self) -> None:
        """End what is being measured: this replica leaves."""
        if tasks := self._tasks.cancel():
            await asyncio.wait(tasks, timeout=self._grace + _MARGIN)

    async def _answer(self, number: int, name: str, within: float, is_again: bool) -> None:
        answer: dict[str, Any]
        try:
            score = await self._measure(name, within, is_again)
            answer = {"score": dataclasses.asdict(score)}
        except scores.NoScore as exc:
            answer = {"failure": str(exc)}
        except Exception as exc:  # ours: the parent must not wait for ever because of it
            logger.exception("the benchmark of %s broke off", name)
            answer = {"failure": f"{type(exc).__name__}: {exc}"}
        self._link.report(frames.Report.MEASURED, number, json.dumps(answer))

    async def _measure(self, name: str, within: float, is_again: bool) -> snapshot.TaskScore:
        task = self._app.tasks.get(name)
        if getattr(task, "gw_method", None) is None:
            raise scores.NoScore("no task of this name is served here")
        logger.info("the benchmark of %s begins", name)
        measurement = Measurement(task, self._inputs, self._grace)
        bound = asyncio.timeout(within)
        try:
            async with bound:
                score = await measurement.run()
        except TimeoutError as exc:
            if not bound.expired():
                raise
            if is_again and measurement.is_stuck:  # else the parent ends this process anyway
                self._link.report(frames.Report.STUCK, name)
            raise scores.NoScore(
                f"it was not over after {within:.0f} s (setting gw_benchmark_timeout)"
            ) from exc
        logger.info("the score of %s is %.4g/s", name, score.value)
        return score


class Measurement:
    """The benchmark of one task; on the loop of the replica.

    Args:
        task: the Celery task, its body open to limits.
        inputs: those of this replica.
        grace: seconds that an input has to end that was stopped.
    """

    def __init__(self, task: Any, inputs: tracer.ReplicaInputs, grace: float) -> None:
        self._task = task
        self._inputs = inputs
        self._grace = grace
        self._method: services.Method = task.gw_method
        self._parallel = parallel(task.gw_service, self._method)
        self._source = _declared(self._method)
        # The same inputs each time, so that two measures differ by the replica alone.
        self._random = random.Random(self._method.task_name)
        self._has_logged = self._has_warned = False
        #: An input goes on that was stopped, and cannot be ended.
        self.is_stuck = False

    async def run(self) -> snapshot.TaskScore:
        """Return the score, after a pass that is not counted.

        Raises:
            NoScore: when no input succeeds, or the generator gives none.
        """
        await self._round()
        rounds = [await self._round() for _ in range(self._source.runs)]
        return scores.of(self._method.task_name, rounds)

    async def _round(self) -> scores.Round:
        calls = await loop.in_thread(self._calls)
        await self._run_together(calls)
        succeeded = [call for call in calls if call.failure is None]
        failures = [call.failure for call in calls if call.failure is not None]
        return scores.Round(
            elapsed=max(call.ended for call in calls) - min(call.began for call in calls),
            workload=sum(call.workload for call in succeeded),
            latencies=tuple(call.ended - call.began for call in succeeded),
            failures=len(failures),
            failure=failures[0] if failures else "",
        )

    async def _run_together(self, calls: list[_Call]) -> None:
        tasks = [asyncio.create_task(self._run(call)) for call in calls]
        try:
            await asyncio.wait(tasks)
            for task in tasks:
                task.result()
        finally:
            # Out of time: what an input has begun ends as that of a revoked one does.
            if left := [task for task in tasks if not task.done()]:
                for call in calls:
                    call.input.stop()
                _, going_on = await asyncio.wait(left, timeout=self._grace)
                self.is_stuck = bool(going_on)

    async def _run(self, call: _Call) -> None:
        # A task of its own, and so a context: it is the input's.
        followed = task_context.bind()
        replica_input.current.set(call.input)
        batcher.joining.set(call.input)
        limits = self._limits(call)
        call.began = time.perf_counter()
        try:
            await self._inputs.call(call.input, call.run)
        except (Exception, execution.Stopped) as exc:
            call.failure = call.failure or f"{type(exc).__name__}: {exc}"[:_LONGEST]
            if not self._has_logged:
                self._has_logged = True
                logger.warning("an input of the benchmark of %s failed", call.name, exc_info=exc)
        finally:
            call.ended = time.perf_counter()
            followed.end()
            for limit in limits:
                limit.cancel()

    def _limits(self, call: _Call) -> list[asyncio.TimerHandle]:
        """Have the limits of the task end an input of it, as the worker does in traffic."""
        soft, hard = self._task.soft_time_limit, self._task.time_limit
        later = asyncio.get_running_loop().call_later
        timers = [later(soft, call.input.limit, soft)] if soft else []
        return [*timers, later(hard, call.stop, hard)] if hard else timers

    # -- inputs --

    def _calls(self) -> list[_Call]:
        samples = self._samples()
        return [_Call(self._task, sample, self._workload(sample)) for sample in samples]

    def _samples(self) -> list[dict[str, Any]]:
        """Draw the inputs of one round; in a thread, for the generator may take its time."""
        if self._source.generator is None:
            samples = self._random.choices(self._source.dataset, k=self._parallel)
            return [dict(copy.deepcopy(sample)) for sample in samples]  # a body may change it
        return [self._generate(self._source.generator) for _ in range(self._parallel)]

    def _generate(self, generator: Callable[[], Any]) -> dict[str, Any]:
        name = f"benchmark_generator of {self._task.name}"
        try:
            sample = generator()
        except BaseException as exc:  # in a thread of its own: nothing else interrupts it
            raise scores.NoScore(f"{name} raised {type(exc).__name__}: {exc}") from exc
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
        except BaseException as exc:  # as for callers, who count such an input as the default
            what = f"raised {exc!r:.200}"
        # Calls by position may have a workload where these, by name, have none.
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "workload_calculator of %s %s for a sample of its benchmark, which it gets by "
                "name: it counts as %g, so that the score is not in the unit of the traffic. "
                "Give it the parameters of the task",
                self._task.name,
                what,
                headers.DEFAULT_WORKLOAD,
            )
        return headers.DEFAULT_WORKLOAD


class _Call:
    """One input of a round, and what became of it."""

    def __init__(self, task: Any, kwargs: dict[str, Any], workload: float) -> None:
        self._task = task
        self._kwargs = kwargs
        self.workload = workload
        self.name: str = task.name
        self.input = replica_input.Input(0, self.name, str(uuid.uuid4()), link=None)
        self.began = self.ended = 0.0
        self.failure: str | None = None

    def run(self) -> Any:
        """Call ``run`` of the task, with a request of its own on Celery's stacks.

        It counts as one that was called directly: ``retry()`` raises what made it necessary, and
        sends nothing.
        """
        id_, kwargs = self.input.task_id, self._kwargs
        _state._task_stack.push(self._task)
        self._task.request_stack.push(Context(id=id_, task=self.name, args=(), kwargs=kwargs))
        try:
            return self._task.run(**kwargs)
        finally:
            self._task.request_stack.pop()
            _state._task_stack.pop()

    def stop(self, limit: float) -> None:
        """End it at its time limit."""
        self.failure = f"TimeLimitExceeded: {limit:g} s"
        self.input.stop()


def parallel(service: services.Service, method: services.Method) -> int:
    """Return how many inputs a round of the benchmark starts together.

    As many as the benchmark says, and no more than a replica takes. Batches are measured full: for
    a batched method it is the next multiple of ``max_batch_size``.
    """
    wanted, most = _declared(method).concurrency, service.max_inputs
    if method.batched is None:
        return min(wanted, most)
    size = method.batched.max_batch_size
    return min(-(-wanted // size), most // size) * size


def _declared(method: services.Method) -> markers.Benchmark:
    if method.benchmark is None:
        raise scores.NoScore(f"{method.task_name} declares no benchmark")
    return method.benchmark
