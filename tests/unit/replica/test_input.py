from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.replica import input as replica_input
from gw_celery.runtime import greenlet_bridge
from tests.unit.runtime.tracers import an_input, keep, run

# -- on the loop --


class Loop:
    """An input whose tracer runs in a greenlet on the loop."""

    def __init__(self) -> None:
        self.one = an_input()
        self.waits = asyncio.Event()
        self.go = asyncio.Event()
        self.saw: list[str] = []

    async def wait(self) -> str:
        """Wait like a model, or like a result backend, until told to go on."""
        self.waits.set()
        try:
            await self.go.wait()
        except BaseException as exc:
            self.saw.append(type(exc).__name__)
            raise
        finally:
            self.waits.clear()
            self.go.clear()
        return "answer"

    def body(self) -> Any:
        return self.one.run_body(lambda: greenlet_bridge.drive(self.wait()), (), {})

    async def trace(self, tracer: Callable[[], Any]) -> Any:
        self.one.task = asyncio.current_task()
        return await greenlet_bridge.step(lambda: keep(tracer), self.one)


def on_loop(act: Callable[[Loop], Awaitable[Any]]) -> Any:
    return run(lambda: act(Loop()))


def test_a_soft_limit_is_raised_where_the_body_waits_on_the_loop() -> None:
    async def act(held: Loop) -> Any:
        tracing = asyncio.create_task(held.trace(held.body))
        await held.waits.wait()
        held.one.limit(5)
        outcome = await tracing
        assert held.saw == ["SoftTimeLimitExceeded"]
        assert tracing.cancelling() == 0
        return outcome

    outcome = on_loop(act)
    assert isinstance(outcome, SoftTimeLimitExceeded)
    assert outcome.args == (5,)


def test_a_body_on_the_loop_may_answer_after_its_soft_limit() -> None:
    async def act(held: Loop) -> Any:
        async def body() -> str:
            try:
                return await held.wait()
            except SoftTimeLimitExceeded:
                await asyncio.sleep(0)
                return "partial"

        run = lambda: held.one.run_body(lambda: greenlet_bridge.drive(body()), (), {})  # noqa: E731
        tracing = asyncio.create_task(held.trace(run))
        await held.waits.wait()
        held.one.limit(5)
        return await tracing

    assert on_loop(act) == "partial"


def test_a_stopped_body_is_cancelled_on_the_loop_and_its_tracer_ends() -> None:
    async def act(held: Loop) -> Any:
        tracing = asyncio.create_task(held.trace(held.body))
        await held.waits.wait()
        held.one.stop()
        outcome = await tracing
        assert held.saw == ["CancelledError"]
        assert tracing.cancelling() == 0
        return outcome

    assert isinstance(on_loop(act), execution.Revoked)


def test_a_body_on_the_loop_that_swallows_its_cancellation_is_not_answered() -> None:
    async def act(held: Loop) -> Any:
        async def body() -> str:
            try:
                return await held.wait()
            except asyncio.CancelledError:
                return "I go on"

        run = lambda: held.one.run_body(lambda: greenlet_bridge.drive(body()), (), {})  # noqa: E731
        tracing = asyncio.create_task(held.trace(run))
        await held.waits.wait()
        held.one.stop()
        return await tracing

    assert isinstance(on_loop(act), execution.Revoked)


def test_a_stop_after_a_soft_limit_of_the_same_moment_wins_on_the_loop() -> None:
    async def act(held: Loop) -> Any:
        tracing = asyncio.create_task(held.trace(held.body))
        await held.waits.wait()
        held.one.limit(5)
        held.one.stop()
        return await tracing

    assert isinstance(on_loop(act), execution.Revoked)


@pytest.mark.parametrize(
    ("interrupt", "expected"),
    [
        (lambda one: one.limit(5), SoftTimeLimitExceeded),
        (lambda one: one.stop(), execution.Revoked),
    ],
    ids=["limit", "stop"],
)
def test_what_comes_before_the_body_waits_for_it_on_the_loop(
    interrupt: Callable[[replica_input.InFlight], None], expected: type[BaseException]
) -> None:
    async def act(held: Loop) -> Any:
        stored: list[Any] = []

        def tracer() -> Any:
            stored.append(greenlet_bridge.drive(held.wait()))
            return held.body()

        tracing = asyncio.create_task(held.trace(tracer))
        await held.waits.wait()
        interrupt(held.one)
        held.go.set()
        outcome = await tracing
        assert stored == ["answer"], "the tracer stores that the task has started"
        assert not held.waits.is_set()
        assert held.saw == []
        return outcome

    assert isinstance(on_loop(act), expected)


@pytest.mark.parametrize("interrupt", ["limit", "stop"])
def test_nothing_interrupts_the_storing_of_a_result_on_the_loop(interrupt: str) -> None:
    async def act(held: Loop) -> Any:
        def tracer() -> Any:
            answer = held.one.run_body(lambda: "answer", (), {})
            return answer, greenlet_bridge.drive(held.wait())

        tracing = asyncio.create_task(held.trace(tracer))
        await held.waits.wait()
        held.one.limit(5) if interrupt == "limit" else held.one.stop()
        await asyncio.sleep(0)
        assert held.waits.is_set()
        held.go.set()
        outcome = await tracing
        assert held.saw == []
        assert tracing.cancelling() == 0
        return outcome

    assert on_loop(act) == ("answer", "answer")


def test_the_storing_after_a_handled_soft_limit_is_not_interrupted_either() -> None:
    async def act(held: Loop) -> Any:
        def tracer() -> Any:
            failed = keep(held.body)
            return failed, greenlet_bridge.drive(held.wait())

        tracing = asyncio.create_task(held.trace(tracer))
        await held.waits.wait()
        held.waits = asyncio.Event()
        held.one.limit(5)
        await held.waits.wait()
        held.one.limit(5)
        held.go.set()
        return await tracing

    failed, stored = on_loop(act)
    assert isinstance(failed, SoftTimeLimitExceeded)
    assert stored == "answer"


def test_a_cancellation_of_the_bodys_own_making_is_its_failure() -> None:
    async def act(held: Loop) -> Any:
        async def body() -> None:
            raise asyncio.CancelledError("mine")

        return await held.trace(
            lambda: held.one.run_body(lambda: greenlet_bridge.drive(body()), (), {})
        )

    outcome = on_loop(act)
    assert isinstance(outcome, errors.BodyExited)
    assert repr(outcome.__cause__) == "CancelledError('mine')"


@pytest.mark.parametrize("serves", [True, False])
def test_a_body_that_cancels_its_task_fails_unless_its_process_ends(
    serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "current", lambda: object() if serves else None)

    async def act(held: Loop) -> Any:
        async def body() -> None:
            assert held.one.task is not None
            held.one.task.cancel()
            await asyncio.sleep(0)

        return await held.trace(
            lambda: held.one.run_body(lambda: greenlet_bridge.drive(body()), (), {})
        )

    outcome = on_loop(act)
    assert type(outcome) is (errors.BodyExited if serves else asyncio.CancelledError)
    assert not isinstance(outcome, execution.Revoked)


# -- whose body it is --


def test_a_tasks_run_outside_any_input_is_as_written() -> None:
    def run(x: int, *, y: int) -> int:
        """Adds."""
        return x + y

    opened = replica_input.open_body(run)
    assert opened(1, y=2) == 3
    assert (opened.__name__, opened.__doc__) == ("run", "Adds.")


def test_a_nested_call_is_part_of_its_callers_body() -> None:
    one = an_input()
    inner = replica_input.open_body(lambda: keep(lambda: one.limit(5)) or "inner")

    def outer() -> Any:
        return inner()

    def trace() -> Any:
        token = replica_input.current.set(one)
        try:
            return replica_input.open_body(outer)()
        finally:
            replica_input.current.reset(token)

    assert isinstance(keep(trace), SoftTimeLimitExceeded)


def test_the_tracer_of_an_input_is_open_to_its_limits() -> None:
    one = an_input()
    one.stop()
    token = replica_input.current.set(one)
    try:
        with pytest.raises(execution.Revoked):
            replica_input.open_body(lambda: "never")()
    finally:
        replica_input.current.reset(token)
