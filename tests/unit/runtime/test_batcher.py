"""What a batched method's inputs see, in the process of a test as in a replica."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import gw_celery as gw
from gw_celery import errors
from gw_celery.testing import FakeClock
from tests import child_harness
from tests.child_harness import DEADLINE, Child, Order, Outcome, Report
from tests.processes import eventually
from tests.unit.runtime.served import app_of_its_own, on_loop

Submit = Callable[..., Awaitable[Any]]


def gathering(
    scenario: Callable[[Submit], Awaitable[None]],
    body: Callable[..., Any],
    *,
    clock: FakeClock | None = None,
    **bounds: Any,
) -> None:
    """Run ``scenario`` where ``body`` is served, with a function that submits one input to it."""
    app = app_of_its_own()

    async def fn(xs: list[int], scale: int = 1) -> list[Any]:
        return await body(xs, scale)

    submit: Any = app.remote(gw.concurrent(max_inputs=1000)(gw.batched(**bounds)(fn)))
    on_loop(app, lambda: scenario(submit), clock)


class Calls:
    """A body that keeps what it was called with, and answers or raises as it is told."""

    def __init__(self, answer: Callable[[list[Any]], Any] = lambda xs: [x * 10 for x in xs]):
        self.seen: list[list[Any]] = []
        self.batches: list[Any] = []
        self.was_cancelled = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.entered = asyncio.Event()
        self._answer = answer
        self.__name__ = "calls"

    async def __call__(self, xs: list[int], scale: list[int]) -> Any:
        self.seen.append(xs)
        self.batches.append(gw.current_batch())
        self.entered.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        return self._answer(xs)


def raising_for(*bad: int, exc: type[Exception] = ValueError) -> Callable[[list[int]], list[int]]:
    def answer(xs: list[int]) -> list[int]:
        if found := [x for x in xs if x in bad]:
            raise exc(f"bad {found}")
        return [x * 10 for x in xs]

    return answer


def test_inputs_of_one_turn_of_the_loop_share_a_call_without_a_wait() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        assert await asyncio.gather(*(submit(x) for x in range(5))) == [0, 10, 20, 30, 40]

    gathering(scenario, calls, max_batch_size=8, wait_ms=0)
    assert calls.seen == [[0, 1, 2, 3, 4]]
    (batch,) = calls.batches
    assert batch is not None
    assert (batch.size, batch.flush, len(batch.waited)) == (5, "due", 5)


def test_a_batch_is_due_once_its_oldest_input_has_waited_for_long_enough() -> None:
    calls, clock = Calls(), FakeClock()

    async def scenario(submit: Submit) -> None:
        first = asyncio.ensure_future(submit(1))
        assert await clock.armed() == pytest.approx(0.03)
        clock.advance(0.02)
        second = asyncio.ensure_future(submit(2))
        for _ in range(10):
            await asyncio.sleep(0)
        assert calls.seen == []
        assert await clock.armed() == pytest.approx(0.01)
        clock.advance(0.01)
        assert await asyncio.wait_for(asyncio.gather(first, second), 10) == [10, 20]

    gathering(scenario, calls, clock=clock, max_batch_size=8, wait_ms=30)
    assert calls.seen == [[1, 2]]
    (batch,) = calls.batches
    assert batch is not None
    assert batch.waited == pytest.approx((0.03, 0.01))


def test_a_single_input_waits_in_real_time_no_longer_than_it_may() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        assert await submit(1) == 10

    gathering(scenario, calls, max_batch_size=8, wait_ms=30)
    (batch,) = calls.batches
    assert batch is not None
    assert batch.waited[0] >= 0.03


def test_a_full_batch_waits_for_nothing() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        await asyncio.wait_for(asyncio.gather(*(submit(x) for x in range(4))), 10)

    gathering(scenario, calls, max_batch_size=2, wait_ms=600_000)
    assert calls.seen == [[0, 1], [2, 3]]


def test_while_a_call_runs_inputs_gather_for_the_next() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        calls.open.clear()
        first = asyncio.ensure_future(submit(0))
        await calls.entered.wait()
        late = [asyncio.ensure_future(submit(x)) for x in (1, 2)]
        await asyncio.sleep(0)
        late.append(asyncio.ensure_future(submit(3)))
        calls.open.set()
        assert await asyncio.gather(first, *late) == [0, 10, 20, 30]

    gathering(scenario, calls, max_batch_size=8, wait_ms=0)
    assert calls.seen == [[0], [1, 2, 3]]


def test_as_many_calls_run_at_a_time_as_declared() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        calls.open.clear()
        waiting = [asyncio.ensure_future(submit(x)) for x in range(6)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert calls.seen == [[0, 1], [2, 3]]
        calls.open.set()
        await asyncio.gather(*waiting)

    gathering(scenario, calls, max_batch_size=2, max_running_batches=2)
    assert calls.seen == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("key", [None, lambda x: "the same"])
def test_inputs_of_different_parameters_never_share_a_call(key: Any) -> None:
    app, calls = app_of_its_own(), []

    @app.cls
    @gw.concurrent(max_inputs=16)
    class Model:
        name: str = gw.parameter(default="small")
        threshold: float = gw.parameter(default=0.5)

        @gw.on_enter()
        def load(self) -> None:
            self.loaded = self.name

        @gw.method()
        @gw.batched(max_batch_size=8, key=key)
        async def predict(self, xs: list[int]) -> list[Any]:
            calls.append(xs)
            return [(self.loaded, self.threshold)] * len(xs)

    given: list[dict[str, Any]] = [{}, {"threshold": 0.5}, {"threshold": 1}, {"threshold": 1.0}]
    given += [{"name": "large"}, {"name": "large", "threshold": 1.0}]

    async def scenario() -> Any:
        return await asyncio.gather(*(Model(**one).predict(x) for x, one in enumerate(given)))

    values = [({"name": "small", "threshold": 0.5} | one).values() for one in given]
    assert on_loop(app, scenario) == [tuple(one) for one in values]
    assert sorted(calls) == [[0, 1], [2, 3], [4], [5]]


def test_a_key_that_cannot_be_hashed_fails_its_input_and_says_so() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        with pytest.raises(errors.UsageError, match=r"key= of .* returned \[1\]"):
            await submit(1)

    gathering(scenario, calls, max_batch_size=8, key=lambda x: [x])
    assert calls.seen == []


def test_the_cost_bounds_a_call() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        await asyncio.gather(*(submit(x) for x in (3, 3, 3, 9)))

    gathering(scenario, calls, max_batch_size=8, size_fn=lambda x, scale=1: x, max_batch_cost=7)
    assert calls.seen == [[3, 3], [3], [9]]


def test_a_cost_may_be_any_kind_of_whole_number() -> None:
    class Int64:
        """As numpy's."""

        def __index__(self) -> int:
            return 4

    calls = Calls()

    async def scenario(submit: Submit) -> None:
        await asyncio.gather(*(submit(x) for x in range(3)))

    gathering(scenario, calls, max_batch_size=8, size_fn=lambda x: Int64(), max_batch_cost=8)
    assert calls.seen == [[0, 1], [2]]


@pytest.mark.parametrize("cost", [1.5, True, -1, "3", None])
def test_a_cost_that_is_no_number_of_units_fails_its_input(cost: Any) -> None:
    async def scenario(submit: Submit) -> None:
        with pytest.raises(errors.UsageError, match="size_fn of"):
            await submit(1)

    gathering(scenario, Calls(), max_batch_size=8, size_fn=lambda x: cost, max_batch_cost=7)


def test_defaults_are_applied_and_every_parameter_is_a_list() -> None:
    got: list[Any] = []

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        got.append((xs, scale))
        return xs

    async def scenario(submit: Submit) -> None:
        await asyncio.gather(submit(1), submit(2, scale=5))

    gathering(scenario, body, max_batch_size=8)
    assert got == [([1, 2], [1, 5])]


# -- what goes wrong --


def test_what_is_no_exception_in_the_answer_fails_its_input_all_the_same() -> None:
    async def scenario(submit: Submit) -> None:
        with pytest.raises(errors.BodyExited, match="answer with an Exception"):
            await submit(1)

    gathering(scenario, Calls(lambda xs: [SystemExit(3)]), max_batch_size=8)


def test_the_one_bad_input_of_64_fails_with_its_own_error() -> None:
    calls = Calls(raising_for(37))

    async def scenario(submit: Submit) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(64)), return_exceptions=True)
        (failed,) = [one for one in answers if isinstance(one, Exception)]
        assert (type(failed), str(failed)) == (ValueError, "bad [37]")
        assert answers[37] is failed
        assert [x for x in answers if x is not failed] == [x * 10 for x in range(64) if x != 37]

    gathering(scenario, calls, max_batch_size=64)
    assert len(calls.seen) == 1 + 2 * 6


def test_a_method_that_does_not_isolate_fails_all_inputs_of_the_call() -> None:
    calls = Calls(raising_for(1))

    async def scenario(submit: Submit) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(4)), return_exceptions=True)
        assert [str(one) for one in answers] == ["bad [1]"] * 4

    gathering(scenario, calls, max_batch_size=8, on_error="fail")
    assert len(calls.seen) == 1


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def test_a_call_that_runs_out_of_memory_is_halved_and_the_method_takes_less_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(xs: list[int]) -> list[int]:
        if len(xs) > 4:
            raise OutOfMemoryError("CUDA out of memory")
        return [x * 10 for x in xs]

    calls = Calls(answer)

    async def scenario(submit: Submit) -> None:
        for _ in range(2):
            answers = await asyncio.gather(*(submit(x) for x in range(16)))
            assert answers == [x * 10 for x in range(16)]

    gathering(scenario, calls, max_batch_size=16, on_error="fail")
    assert [len(xs) for xs in calls.seen] == [16, 8, *[4] * 8]
    assert "its batches have 4 inputs at most" in caplog.text


def test_an_input_that_alone_is_too_large_fails_and_bounds_nothing() -> None:
    calls = Calls(raising_for(3, exc=OutOfMemoryError))

    async def scenario(submit: Submit) -> None:
        with pytest.raises(OutOfMemoryError, match="bad"):
            await submit(3)
        await asyncio.gather(*(submit(x) for x in range(3)))

    gathering(scenario, calls, max_batch_size=4)
    assert calls.seen == [[3], [0, 1, 2]]


def test_the_frames_of_a_call_that_ran_out_of_memory_let_go_of_their_tensors() -> None:
    seen: list[list[int]] = []
    alive: list[int] = []

    class Tensor:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        seen.append(xs)
        assert not alive
        tensor = Tensor()
        try:
            raise ValueError(str(tensor))
        except ValueError as exc:
            if len(xs) > 1:
                raise OutOfMemoryError from exc
        return xs

    async def scenario(submit: Submit) -> None:
        assert await asyncio.gather(submit(1), submit(2)) == [1, 2]

    gathering(scenario, body, max_batch_size=2)
    assert seen == [[1, 2], [1], [2]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda xs: xs[:-1], "list of 2 entries"),
        (dict.fromkeys, "dict of 3 entries"),
        (lambda xs: "abc", "str of 3 entries"),
        (lambda xs: (x for x in xs), "generator of no entries"),
        (lambda xs: None, "NoneType of no entries"),
        (set, "set of 3 entries"),
    ],
)
def test_an_answer_that_is_no_list_of_the_same_length_fails_every_input(
    answer: Callable[[list[Any]], Any], said: str
) -> None:
    calls = Calls(answer)

    async def scenario(submit: Submit) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(3)), return_exceptions=True)
        for one in answers:
            assert isinstance(one, errors.UsageError)
            assert f"got 3 inputs and answered with a {said}" in str(one)

    gathering(scenario, calls, max_batch_size=8)
    assert len(calls.seen) == 1


def test_a_body_that_exits_fails_its_inputs_and_not_the_process() -> None:
    def leave(xs: list[int]) -> None:
        raise SystemExit(3)

    async def scenario(submit: Submit) -> None:
        with pytest.raises(errors.BodyExited, match="would end its process"):
            await submit(1)

    gathering(scenario, Calls(leave), max_batch_size=8)


def test_a_body_that_cancels_its_own_task_fails_its_inputs_and_the_next_are_served() -> None:
    async def body(xs: list[int], scale: list[int]) -> list[int]:
        if 1 in xs:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.Event().wait()
        return xs

    async def scenario(submit: Submit) -> None:
        with pytest.raises(errors.BodyExited, match="cancelled its own task"):
            await asyncio.wait_for(submit(1), 10)
        assert await asyncio.wait_for(submit(2), 10) == 2

    gathering(scenario, body, max_batch_size=8)


# -- inputs whose callers have given up --


def test_one_that_gives_up_before_the_call_is_not_in_it() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        calls.open.clear()
        first = asyncio.ensure_future(submit(0))
        await calls.entered.wait()
        leaving, staying = (asyncio.ensure_future(submit(x)) for x in (1, 2))
        await asyncio.sleep(0)
        leaving.cancel()
        calls.open.set()
        assert await first == 0
        assert await staying == 20

    gathering(scenario, calls, max_batch_size=8)
    assert calls.seen == [[0], [2]]


def test_one_that_gives_up_during_the_call_harms_no_other() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        calls.open.clear()
        leaving, staying = (asyncio.ensure_future(submit(x)) for x in (1, 2))
        await calls.entered.wait()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        calls.open.set()
        assert await staying == 20

    gathering(scenario, calls, max_batch_size=8)
    assert calls.seen == [[1, 2]]


def test_a_call_that_no_input_waits_for_is_cancelled_and_the_next_are_served() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        calls.open.clear()
        leaving = [asyncio.ensure_future(submit(x)) for x in (1, 2)]
        await calls.entered.wait()
        leaving[0].cancel()
        await asyncio.sleep(0)
        assert not calls.was_cancelled.is_set()
        leaving[1].cancel()
        after = asyncio.ensure_future(submit(3))
        await asyncio.wait_for(calls.was_cancelled.wait(), 10)
        calls.open.set()
        assert await after == 30

    gathering(scenario, calls, max_batch_size=8)
    assert calls.seen == [[1, 2], [3]]


# -- where the body runs --


# -- where the body runs --


def test_an_instance_is_in_use_until_its_call_is_over_though_no_input_waits_any_more() -> None:
    open_, entered = asyncio.Event(), asyncio.Event()
    log: list[str] = []
    app = app_of_its_own(gw_max_instances=2)

    @app.cls
    @gw.concurrent(max_inputs=8)
    class Model:
        name: str = gw.parameter(default="small")

        @gw.on_enter()
        async def load(self) -> None:
            self.loaded = self.name

        @gw.on_exit()
        async def unload(self) -> None:
            log.append(f"{self.loaded} left")

        @gw.method()
        @gw.batched(max_batch_size=8)
        async def predict(self, xs: list[int]) -> list[str]:
            entered.set()
            while self.loaded == "a" and not open_.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await open_.wait()
            log.append(f"{self.loaded} ran")
            return [self.loaded for _ in xs]

        @gw.method()
        async def name_of(self) -> str:
            return self.loaded

    async def scenario() -> None:
        leaving = asyncio.ensure_future(Model(name="a").predict(1))
        await entered.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        other = asyncio.ensure_future(Model(name="b").name_of())
        for _ in range(20):
            await asyncio.sleep(0)
        assert log == []
        open_.set()
        assert await other == "b"
        assert log == ["a ran", "a left"]

    on_loop(app, scenario)


def test_a_stop_iteration_in_a_thread_fails_its_input_and_the_next_are_served() -> None:
    app = app_of_its_own()

    @app.cls
    class Model:
        @gw.method()
        @gw.batched(max_batch_size=8)
        def body(self, xs: list[int]) -> list[int]:
            if 1 in xs:
                raise StopIteration
            return xs

    async def scenario() -> None:
        with pytest.raises(gw.BodyExited, match="StopIteration"):
            await Model().body(1)
        assert await Model().body(2) == 2

    on_loop(app, scenario)


def test_the_body_belongs_to_no_input() -> None:
    caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="unset")
    seen: list[str] = []

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        seen.append(caller.get())
        return xs

    async def scenario(submit: Submit) -> None:
        caller.set("an input")
        await submit(1)

    gathering(scenario, body, max_batch_size=8)
    assert seen == ["unset"]


def test_only_the_body_knows_of_its_batch() -> None:
    calls = Calls()

    async def scenario(submit: Submit) -> None:
        await submit(1)
        assert gw.current_batch() is None

    gathering(scenario, calls, max_batch_size=8)
    assert calls.batches[0] is not None


# -- in a child --


class Held:
    """A batched task whose body waits in its call until the test lets it end."""

    def __init__(self, app: gw.App, **bounds: Any) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.batches: list[Any] = []

        async def held(xs: list[int]) -> list[int]:
            self.batches.append((xs, gw.current_batch().flush))
            self.entered.set()
            while not self.go.is_set():  # it cannot be cancelled
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
            return xs

        declared: Any = app.remote(gw.concurrent(max_inputs=8)(gw.batched(**bounds)(held)))
        self.name: str = declared.name


@pytest.fixture
def gathers(app: gw.App) -> Iterator[tuple[Child, Held]]:
    """A child with a method that gathers for ten minutes, unless there is a reason not to."""
    held = Held(app, max_batch_size=8, wait_ms=600_000)
    held.go.set()
    with child_harness.child_of(app) as child:
        yield child, held


def test_a_drain_lets_what_is_here_run_at_once(gathers: tuple[Child, Held]) -> None:
    child, held = gathers
    number = child.run(held.name, 1)
    child.settle()
    child.send(Order.DRAIN)
    assert child.outcome(number) == (Report.DONE, "1")
    assert child.outcome(child.run(held.name, 2)) == (Report.DONE, "2")
    assert held.batches == [([1], "drain"), ([2], "drain")]


def test_a_suspect_does_not_wait_for_others(gathers: tuple[Child, Held]) -> None:
    child, held = gathers
    assert child.outcome(child.run(held.name, 1, alone=True)) == (Report.DONE, "1")


def test_what_began_is_told_before_the_body_can_end_the_process(app: gw.App) -> None:
    go = threading.Event()

    @app.remote
    @gw.batched(max_batch_size=2)
    async def block(xs: list[int]) -> list[int]:
        go.wait(DEADLINE)  # the loop, too
        return xs

    with child_harness.child_of(app) as child:
        number = child.run(block.name, 1)
        eventually(lambda: child.told(number) == [Report.ACCEPT])
        go.set()
        assert child.outcome(number) == (Report.DONE, "1")


def test_a_deserted_call_that_goes_on_is_told_once_when_it_has_had_its_time(app: gw.App) -> None:
    held = Held(app, max_batch_size=8)
    with child_harness.child_of(app, gw_cancel_timeout=0.3) as child:
        numbers = [child.run(held.name, x) for x in (1, 1, 1)]
        assert held.entered.wait(DEADLINE)
        stopped_at = time.monotonic()
        child.send_together(*((Order.STOP, number) for number in numbers))
        for number in numbers:
            assert child.outcome(number) == (Report.ERROR, Outcome.IGNORE, "Ignore")
        eventually(lambda: stuck(child))
        assert time.monotonic() - stopped_at >= 0.3
        held.go.set()
        assert child.outcome(child.run(held.name, 2)) == (Report.DONE, "2")
        assert stuck(child) == [[Report.STUCK, held.name]]


def stuck(child: Child) -> list[list[Any]]:
    child.told(0)
    return [report for report in child.reports if report[0] == Report.STUCK]
