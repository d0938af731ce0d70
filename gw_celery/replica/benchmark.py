"""Measures one task of a replica, through all that a real input goes through but Celery's tracer.

That is what stores results and tells of them: without it nothing outside this process learns of an
input. Greenlet or thread, wrappers of ``run``, limits, instances and batches are the real ones.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from celery import _state
from celery.app.task import Context

from gw_celery.client import execution, task_context
from gw_celery.declare import benchmark, services
from gw_celery.policy import scores
from gw_celery.protocol import headers, snapshot
from gw_celery.replica import input as replica_input
from gw_celery.runtime import batch_items, loop

logger = logging.getLogger(__name__)

#: Characters of a failure that are told.
_LONGEST = 1000

#: ``Inputs.called``: runs a function where the tracer of an input would run.
Called = Callable[[replica_input.InFlight, Callable[[], Any]], Awaitable[Any]]


class Measurement:
    """The benchmark of one task; on the loop of the replica.

    Args:
        task: the Celery task, its body open to limits.
        called: runs a function where the tracer of an input would run.
        grace: seconds that an input has to end that was stopped.
    """

    def __init__(self, task: Any, called: Called, grace: float) -> None:
        self._task = task
        self._called = called
        self._grace = grace
        self._method: services.Method = task.gw_method
        self._parallel = parallel(task.gw_service, self._method)
        self._source = _declared(self._method)
        # The same inputs each time, so that two measures differ by the replica alone.
        self._random = random.Random(self._method.task_name)
        self._has_logged = self._has_told = False
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
        await self._together(calls)
        succeeded = [one for one in calls if one.failure is None]
        failures = [one.failure for one in calls if one.failure is not None]
        return scores.Round(
            elapsed=max(one.ended for one in calls) - min(one.began for one in calls),
            workload=sum(one.workload for one in succeeded),
            latencies=tuple(one.ended - one.began for one in succeeded),
            failures=len(failures),
            failure=failures[0] if failures else "",
        )

    async def _together(self, calls: list[_Call]) -> None:
        tasks = [asyncio.create_task(self._one(call)) for call in calls]
        try:
            await asyncio.wait(tasks)
            for one in tasks:
                one.result()
        finally:
            # Out of time: what an input has begun ends as that of a revoked one does.
            if left := [one for one in tasks if not one.done()]:
                for call in calls:
                    call.input.stop()
                _, going_on = await asyncio.wait(left, timeout=self._grace)
                self.is_stuck = bool(going_on)

    async def _one(self, call: _Call) -> None:
        # A task of its own, and so a context: it is the input's.
        followed = task_context.bind()
        replica_input.current.set(call.input)
        batch_items.joining.set(call.input)
        limits = self._limits(call)
        call.began = time.perf_counter()
        try:
            await self._called(call.input, call.run)
        except (Exception, execution.Stopped) as exc:
            call.failure = call.failure or f"{type(exc).__name__}: {exc}"[:_LONGEST]
            self._log(exc)
        finally:
            call.ended = time.perf_counter()
            followed.end()
            for one in limits:
                one.cancel()

    def _limits(self, call: _Call) -> list[asyncio.TimerHandle]:
        """Have the limits of the task end an input of it, as the worker does in traffic."""
        soft, hard = self._task.soft_time_limit, self._task.time_limit
        later = asyncio.get_running_loop().call_later
        armed = [later(soft, call.input.limit, soft)] if soft else []
        return [*armed, later(hard, call.stop, hard)] if hard else armed

    def _log(self, exc: BaseException) -> None:
        if not self._has_logged:
            self._has_logged = True
            logger.warning("an input of the benchmark of %s failed", self._task.name, exc_info=exc)

    # -- inputs --

    def _calls(self) -> list[_Call]:
        return [_Call(self._task, one, self._workload(one)) for one in self._samples()]

    def _samples(self) -> list[dict[str, Any]]:
        """Draw the inputs of one round; in a thread, for the generator may take its time."""
        if self._source.generator is None:
            drawn = self._random.choices(self._source.dataset, k=self._parallel)
            return [dict(copy.deepcopy(one)) for one in drawn]  # a body may change what it gets
        return [self._made(self._source.generator) for _ in range(self._parallel)]

    def _made(self, generator: Callable[[], Any]) -> dict[str, Any]:
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
            given = calculator(**kwargs)
            workload = headers.workload(given)
            what = f"returned {given!r:.100}"
        except BaseException as exc:  # as for callers, who count such an input as the default
            workload, what = None, f"raised {exc!r:.200}"
        if workload is not None:
            return workload
        self._tell_of_calculator(what)
        return headers.DEFAULT_WORKLOAD

    def _tell_of_calculator(self, what: str) -> None:
        """Once: calls by position may have a workload where these, by name, have none."""
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "workload_calculator of %s %s for a sample of its benchmark, which it gets by "
                "name: it counts as %g, so that the score is not in the unit of the traffic. "
                "Give it the parameters of the task",
                self._task.name,
                what,
                headers.DEFAULT_WORKLOAD,
            )


class _Call:
    """One input of a round, and what became of it."""

    def __init__(self, task: Any, kwargs: dict[str, Any], workload: float) -> None:
        self._task = task
        self._kwargs = kwargs
        self.workload = workload
        self.id = str(uuid.uuid4())
        self.input = replica_input.InFlight(0, task.name, self.id, lambda report: None)
        self.input.is_unseen = True
        self.began = self.ended = 0.0
        self.failure: str | None = None

    def run(self) -> Any:
        """Call ``run`` of the task, with a request of its own on Celery's stacks.

        It counts as one that was called directly: ``retry()`` raises what made it necessary, and
        sends nothing.
        """
        kwargs, name = self._kwargs, self._task.name
        _state._task_stack.push(self._task)
        self._task.request_stack.push(Context(id=self.id, task=name, args=(), kwargs=kwargs))
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


def _declared(method: services.Method) -> benchmark.Benchmark:
    if method.benchmark is None:
        raise scores.NoScore(f"{method.task_name} declares no benchmark")
    return method.benchmark
