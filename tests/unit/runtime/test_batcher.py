from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore

import gw_celery as gw
from gw_celery import errors, types
from gw_celery.runtime import batch_items, batcher
from gw_celery.testing import FakeClock

Submit = Callable[..., Awaitable[Any]]


def gathering(
    test: Callable[[Submit, batcher.Batchers], Awaitable[None]],
    body: Callable[..., Any],
    *,
    using: Any = None,
    host: dict[str, Any] | None = None,
    **bounds: Any,
) -> None:
    """Run ``test`` with a function that submits one input to a batcher of ``body``."""
    app = gw.App("unit")
    app.remote(gw.concurrent(max_inputs=1000)(gw.batched(**bounds)(_named(body))))
    (service,) = app.registry.services.values()
    (method,) = service.methods.values()

    async def main() -> None:
        batchers = batcher.Batchers(**(host or {}))

        def submit(*args: Any, key: Any = None, **kwargs: Any) -> Awaitable[Any]:
            given = {} if using is None else {"using": using}
            return batchers.of(service, method).submit(body, args, kwargs, key=key, **given)

        await test(submit, batchers)

    asyncio.run(main())


def _named(body: Callable[..., Any]) -> Callable[..., Any]:
    async def fn(xs: list[int], scale: int = 1) -> list[Any]: ...

    fn.__name__ = body.__name__
    return fn


class Calls:
    """A body that keeps what it was called with, and answers or raises as it is told."""

    def __init__(self, answer: Callable[[list[Any]], Any] = lambda xs: [x * 10 for x in xs]):
        self.seen: list[list[Any]] = []
        self.batches: list[types.Batch | None] = []
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

    async def test(submit: Submit, _: Any) -> None:
        assert await asyncio.gather(*(submit(x) for x in range(5))) == [0, 10, 20, 30, 40]

    gathering(test, calls, max_batch_size=8, wait_ms=0)
    assert calls.seen == [[0, 1, 2, 3, 4]]
    (batch,) = calls.batches
    assert batch is not None
    assert (batch.size, batch.flush, len(batch.waited)) == (5, "due", 5)


def test_a_batch_is_due_once_its_oldest_input_has_waited_for_long_enough() -> None:
    calls, clock = Calls(), FakeClock()

    async def test(submit: Submit, _: Any) -> None:
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

    gathering(test, calls, host={"clock": clock}, max_batch_size=8, wait_ms=30)
    assert calls.seen == [[1, 2]]
    (batch,) = calls.batches
    assert batch is not None
    assert batch.waited == pytest.approx((0.03, 0.01))


def test_a_single_input_waits_in_real_time_no_longer_than_it_may() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        assert await submit(1) == 10

    gathering(test, calls, max_batch_size=8, wait_ms=30)
    (batch,) = calls.batches
    assert batch is not None
    assert batch.waited[0] >= 0.03


def test_a_full_batch_waits_for_nothing() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        await asyncio.wait_for(asyncio.gather(*(submit(x) for x in range(4))), 10)

    gathering(test, calls, max_batch_size=2, wait_ms=600_000)
    assert calls.seen == [[0, 1], [2, 3]]


def test_while_a_call_runs_inputs_gather_for_the_next() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        calls.open.clear()
        first = asyncio.ensure_future(submit(0))
        await calls.entered.wait()
        late = [asyncio.ensure_future(submit(x)) for x in (1, 2)]
        await asyncio.sleep(0)
        late.append(asyncio.ensure_future(submit(3)))
        calls.open.set()
        assert await asyncio.gather(first, *late) == [0, 10, 20, 30]

    gathering(test, calls, max_batch_size=8, wait_ms=0)
    assert calls.seen == [[0], [1, 2, 3]]


def test_as_many_calls_run_at_a_time_as_declared() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        calls.open.clear()
        waiting = [asyncio.ensure_future(submit(x)) for x in range(6)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert calls.seen == [[0, 1], [2, 3]]
        calls.open.set()
        await asyncio.gather(*waiting)

    gathering(test, calls, max_batch_size=2, max_running_batches=2)
    assert calls.seen == [[0, 1], [2, 3], [4, 5]]


def test_parameter_sets_and_the_users_keys_are_never_mixed() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        await asyncio.gather(*(submit(x, key=x % 2) for x in range(4)), submit(1, True, key=1))

    gathering(test, calls, max_batch_size=8, key=lambda x, scale=1: scale)
    assert sorted(calls.seen) == [[0, 2], [1], [1, 3]]


def test_a_key_that_cannot_be_hashed_fails_its_input_and_says_so() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        with pytest.raises(errors.UsageError, match=r"key= of .* returned \[1\]"):
            await submit(1)

    gathering(test, calls, max_batch_size=8, key=lambda x: [x])
    assert calls.seen == []


def test_the_cost_bounds_a_call() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        await asyncio.gather(*(submit(x) for x in (3, 3, 3, 9)))

    gathering(test, calls, max_batch_size=8, size_fn=lambda x, scale=1: x, max_batch_cost=7)
    assert calls.seen == [[3, 3], [3], [9]]


def test_a_cost_may_be_any_kind_of_whole_number() -> None:
    class Int64:
        """As numpy's."""

        def __index__(self) -> int:
            return 4

    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        await asyncio.gather(*(submit(x) for x in range(3)))

    gathering(test, calls, max_batch_size=8, size_fn=lambda x: Int64(), max_batch_cost=8)
    assert calls.seen == [[0, 1], [2]]


@pytest.mark.parametrize("cost", [1.5, True, -1, "3", None])
def test_a_cost_that_is_no_number_of_units_fails_its_input(cost: Any) -> None:
    async def test(submit: Submit, _: Any) -> None:
        with pytest.raises(errors.UsageError, match="size_fn of"):
            await submit(1)

    gathering(test, Calls(), max_batch_size=8, size_fn=lambda x: cost, max_batch_cost=7)


def test_defaults_are_applied_and_every_parameter_is_a_list() -> None:
    got: list[Any] = []

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        got.append((xs, scale))
        return xs

    async def test(submit: Submit, _: Any) -> None:
        await asyncio.gather(submit(1), submit(2, scale=5))

    gathering(test, body, max_batch_size=8)
    assert got == [([1, 2], [1, 5])]


# -- what goes wrong --


def test_an_exception_in_the_answer_fails_that_input_alone() -> None:
    async def test(submit: Submit, _: Any) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(3)), return_exceptions=True)
        assert [answers[0], answers[2]] == [0, 20]
        assert isinstance(answers[1], Ignore)

    calls = Calls(lambda xs: [Ignore("not you") if x == 1 else x * 10 for x in xs])
    gathering(test, calls, max_batch_size=8)


def test_what_is_no_exception_in_the_answer_fails_its_input_all_the_same() -> None:
    async def test(submit: Submit, _: Any) -> None:
        with pytest.raises(errors.BodyExited, match="answer with an Exception"):
            await submit(1)

    gathering(test, Calls(lambda xs: [SystemExit(3)]), max_batch_size=8)


def test_the_one_bad_input_of_64_fails_with_its_own_error() -> None:
    calls = Calls(raising_for(37))

    async def test(submit: Submit, _: Any) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(64)), return_exceptions=True)
        (failed,) = [one for one in answers if isinstance(one, Exception)]
        assert (type(failed), str(failed)) == (ValueError, "bad [37]")
        assert answers[37] is failed
        assert [x for x in answers if x is not failed] == [x * 10 for x in range(64) if x != 37]

    gathering(test, calls, max_batch_size=64)
    assert len(calls.seen) == 1 + 2 * 6


def test_a_method_that_does_not_isolate_fails_all_inputs_of_the_call() -> None:
    calls = Calls(raising_for(1))

    async def test(submit: Submit, _: Any) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(4)), return_exceptions=True)
        assert [str(one) for one in answers] == ["bad [1]"] * 4

    gathering(test, calls, max_batch_size=8, on_error="fail")
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

    async def test(submit: Submit, _: Any) -> None:
        for _ in range(2):
            answers = await asyncio.gather(*(submit(x) for x in range(16)))
            assert answers == [x * 10 for x in range(16)]

    gathering(test, calls, max_batch_size=16, on_error="fail")
    assert [len(xs) for xs in calls.seen] == [16, 8, *[4] * 8]
    assert "takes 4 at most" in caplog.text


def test_an_input_that_alone_is_too_large_fails_and_bounds_nothing() -> None:
    calls = Calls(raising_for(3, exc=OutOfMemoryError))

    async def test(submit: Submit, _: Any) -> None:
        with pytest.raises(OutOfMemoryError, match="bad"):
            await submit(3)
        await asyncio.gather(*(submit(x) for x in range(3)))

    gathering(test, calls, max_batch_size=4)
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

    async def test(submit: Submit, _: Any) -> None:
        assert await asyncio.gather(submit(1), submit(2)) == [1, 2]

    gathering(test, body, max_batch_size=2)
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

    async def test(submit: Submit, _: Any) -> None:
        answers = await asyncio.gather(*(submit(x) for x in range(3)), return_exceptions=True)
        for one in answers:
            assert isinstance(one, errors.UsageError)
            assert f"got 3 inputs and answered with a {said}" in str(one)

    gathering(test, calls, max_batch_size=8)
    assert len(calls.seen) == 1


def test_a_body_that_exits_fails_its_inputs_and_not_the_process() -> None:
    def leave(xs: list[int]) -> None:
        raise SystemExit(3)

    async def test(submit: Submit, _: Any) -> None:
        with pytest.raises(errors.BodyExited, match="would end its process"):
            await submit(1)

    gathering(test, Calls(leave), max_batch_size=8)


def test_a_body_that_cancels_its_own_task_fails_its_inputs_and_the_next_are_served() -> None:
    async def body(xs: list[int], scale: list[int]) -> list[int]:
        if 1 in xs:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.Event().wait()
        return xs

    async def test(submit: Submit, _: Any) -> None:
        with pytest.raises(errors.BodyExited, match="cancelled its own task"):
            await asyncio.wait_for(submit(1), 10)
        assert await asyncio.wait_for(submit(2), 10) == 2

    gathering(test, body, max_batch_size=8)


# -- inputs whose callers have given up --


def test_one_that_gives_up_before_the_call_is_not_in_it() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        calls.open.clear()
        first = asyncio.ensure_future(submit(0))
        await calls.entered.wait()
        leaving, staying = (asyncio.ensure_future(submit(x)) for x in (1, 2))
        await asyncio.sleep(0)
        leaving.cancel()
        calls.open.set()
        assert await first == 0
        assert await staying == 20

    gathering(test, calls, max_batch_size=8)
    assert calls.seen == [[0], [2]]


def test_one_that_gives_up_during_the_call_harms_no_other() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
        calls.open.clear()
        leaving, staying = (asyncio.ensure_future(submit(x)) for x in (1, 2))
        await calls.entered.wait()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        calls.open.set()
        assert await staying == 20

    gathering(test, calls, max_batch_size=8)
    assert calls.seen == [[1, 2]]


def test_an_instance_is_in_use_until_its_call_is_over_though_no_input_waits_any_more() -> None:
    open_, entered = asyncio.Event(), asyncio.Event()
    uses: list[str] = []

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        entered.set()
        while not open_.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await open_.wait()
        return xs

    @contextlib.contextmanager
    def using() -> Iterator[None]:
        uses.append("begun")
        yield
        uses.append("over")

    async def test(submit: Submit, _: Any) -> None:
        leaving = asyncio.ensure_future(submit(1))
        await entered.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        before = list(uses)
        open_.set()
        assert await submit(2) == 2
        assert before == ["begun"]
        assert uses[:3] == ["begun", "over", "begun"]

    gathering(test, body, using=using, max_batch_size=8)


def test_a_call_that_no_input_waits_for_is_cancelled_and_the_next_are_served() -> None:
    calls = Calls()

    async def test(submit: Submit, _: Any) -> None:
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

    gathering(test, calls, max_batch_size=8)
    assert calls.seen == [[1, 2], [3]]


def test_a_deserted_call_that_goes_on_is_told_when_it_has_had_its_time() -> None:
    stuck: list[str] = []
    clock, open_, entered = FakeClock(), asyncio.Event(), asyncio.Event()

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        entered.set()
        while not open_.is_set():
            try:
                await open_.wait()
            except asyncio.CancelledError:
                continue
        return xs

    async def test(submit: Submit, _: Any) -> None:
        leaving = [asyncio.ensure_future(submit(x)) for x in (1, 1, 1)]
        await entered.wait()
        for one in leaving:  # in one turn of the loop, as a child is told
            one.cancel()
        assert await clock.armed() == pytest.approx(7.0)
        clock.advance(6.9)
        assert stuck == []
        clock.advance(0.1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(stuck) == 1
        open_.set()
        assert await submit(2) == 2

    host = {"clock": clock, "grace": 7.0, "on_stuck": stuck.append}
    gathering(test, body, host=host, max_batch_size=8)


class Joining:
    """An input that may have been withdrawn, or must run alone."""

    def __init__(self, *, is_wanted: bool = True, runs_alone: bool = False) -> None:
        self.runs_alone = runs_alone
        self.begun = 0
        self.told: list[str] = []
        self._is_wanted = is_wanted

    def record_early_ack(self) -> Awaitable[None]:
        async def tell() -> None:
            self.told.append("announced")

        return tell()

    def begin(self) -> bool:
        self.begun += 1
        self.told.append("begun")
        return self._is_wanted


def test_an_input_begins_when_its_batch_does_and_one_that_was_withdrawn_does_not_join() -> None:
    calls, wanted, gone = Calls(), Joining(), Joining(is_wanted=False)

    async def test(submit: Submit, _: Any) -> None:
        calls.open.clear()
        first = asyncio.ensure_future(submit(0))
        await calls.entered.wait()
        batch_items.joining.set(wanted)
        staying = asyncio.ensure_future(submit(1))
        batch_items.joining.set(gone)
        leaving = asyncio.ensure_future(submit(2))
        await asyncio.sleep(0)
        assert wanted.begun == 0
        calls.open.set()
        assert await asyncio.gather(first, staying) == [0, 10]
        leaving.cancel()

    gathering(test, calls, max_batch_size=8)
    assert calls.seen == [[0], [1]]
    # What is acknowledged as it begins is on record by then, and not while it gathers.
    assert wanted.told == ["announced", "begun"]


def test_a_suspect_does_not_wait_for_others() -> None:
    async def test(submit: Submit, _: Any) -> None:
        batch_items.joining.set(Joining(runs_alone=True))
        assert await asyncio.wait_for(submit(1), 10) == 10

    gathering(test, Calls(), max_batch_size=8, wait_ms=600_000)


def test_a_drain_lets_what_is_here_run_at_once() -> None:
    calls = Calls()

    async def test(submit: Submit, batchers: batcher.Batchers) -> None:
        waiting = asyncio.ensure_future(submit(1))
        await asyncio.sleep(0)
        batchers.drain()
        assert await asyncio.wait_for(waiting, 10) == 10
        assert await asyncio.wait_for(submit(2), 10) == 20

    gathering(test, calls, max_batch_size=8, wait_ms=600_000)
    assert [one.flush for one in calls.batches if one] == ["drain", "drain"]


def test_what_began_is_told_before_the_body_can_end_the_process() -> None:
    told: list[str] = []

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        told.append("body")
        return xs

    app = gw.App("unit")
    app.remote(gw.batched(max_batch_size=2)(_named(body)))
    (service,) = app.registry.services.values()

    async def main() -> None:
        batchers = batcher.Batchers(tell=lambda: told.append("told"))
        (method,) = service.methods.values()
        await batchers.of(service, method).submit(body, (1,), {})

    asyncio.run(main())
    assert told == ["told", "body"]


# -- where the body runs --


def test_a_synchronous_body_runs_in_a_thread_of_its_own_and_knows_its_batch() -> None:
    seen: list[Any] = []

    def body(xs: list[int], scale: list[int]) -> tuple[int, ...]:
        seen.append((threading.current_thread(), gw.current_batch()))
        return tuple(x * 10 for x in xs)

    app = gw.App("unit")

    @app.cls()
    @gw.concurrent(max_inputs=8)
    class Model:
        @gw.method()
        @gw.batched(max_batch_size=8)
        def body(self, xs: list[int], scale: int = 1) -> Any: ...

    (service,) = app.registry.services.values()

    async def main() -> list[int]:
        batchers = batcher.Batchers()
        one = batchers.of(service, service.methods["body"])
        return await asyncio.gather(*(one.submit(body, (x,), {}) for x in range(3)))

    assert asyncio.run(main()) == [0, 10, 20]
    ((thread, batch),) = seen
    assert thread is not threading.main_thread()
    assert batch is not None
    assert batch.size == 3


def test_a_stop_iteration_in_a_thread_fails_its_input_and_the_next_are_served() -> None:
    def body(xs: list[int], scale: list[int]) -> list[int]:
        if 1 in xs:
            raise StopIteration
        return xs

    app = gw.App("unit")

    @app.cls()
    class Model:
        @gw.method()
        @gw.batched(max_batch_size=8)
        def body(self, xs: list[int], scale: int = 1) -> Any: ...

    (service,) = app.registry.services.values()

    async def main() -> int:
        one = batcher.Batchers().of(service, service.methods["body"])
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(one.submit(body, (1,), {}), 10)
        return await asyncio.wait_for(one.submit(body, (2,), {}), 10)

    assert asyncio.run(main()) == 2


def test_the_body_belongs_to_no_input() -> None:
    found: list[Any] = []

    async def body(xs: list[int], scale: list[int]) -> list[int]:
        found.append(
            (batch_items.joining.get(), batch_items.held.get(), batch_items.is_in_batch.get())
        )
        return xs

    async def test(submit: Submit, _: Any) -> None:
        batch_items.joining.set(Joining())
        await submit(1)
        assert gw.current_batch() is None

    gathering(test, body, max_batch_size=8)
    ((joining, (held,), is_in_batch),) = found
    assert (joining, held.split(".")[-1], is_in_batch) == (None, "fn", True)
