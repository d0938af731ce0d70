"""What ``in_process`` does with batched methods: the same as a replica."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import pytest
from celery import current_task

import gw_celery as gw
from gw_celery.testing import FakeClock, in_process

MANY = 64


def together(*calls: Awaitable[Any]) -> list[Any]:
    """The answers and errors of calls that are made at once, in a loop of the test's own."""

    async def main() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)

    return asyncio.run(main())


def waited_for(clock: FakeClock, *calls: Awaitable[Any]) -> list[Any]:
    """As ``together``, for calls that wait for others until the clock is moved."""

    async def main() -> list[Any]:
        answers = asyncio.gather(*calls, return_exceptions=True)
        await clock.armed()
        clock.advance(1)
        return await asyncio.wait_for(answers, 10)

    return asyncio.run(main())


def squarer(app: gw.App, *, is_async: bool, seen: list[Any], **bounds: Any) -> Any:
    """A class task whose batched method notes its inputs, its batch and its thread."""

    def answer(xs: list[int]) -> list[Any]:
        seen.append((xs, gw.current_batch(), threading.current_thread().name))
        return [ValueError(f"bad {x}") if x < 0 else x * x for x in xs]

    if is_async:

        async def square(self: Any, xs: list[int]) -> list[Any]:
            await asyncio.sleep(0)
            return answer(xs)
    else:

        def square(self: Any, xs: list[int]) -> list[Any]:
            return answer(xs)

    marked = gw.method()(gw.batched(**bounds)(square))
    return app.cls(type("Squarer", (), {"square": marked}))


@pytest.mark.parametrize("is_async", [True, False])
def test_calls_of_one_gather_share_calls_of_the_body(app, is_async) -> None:
    seen: list[Any] = []
    squares = squarer(app, is_async=is_async, seen=seen, max_batch_size=MANY, wait_ms=1)()
    clock = FakeClock()
    with in_process(app, clock=clock):
        answers = waited_for(clock, *(squares.square(x) for x in range(MANY + 3)))

    assert answers == [x * x for x in range(MANY + 3)]
    assert [xs for xs, _, _ in seen] == [list(range(MANY)), [MANY, MANY + 1, MANY + 2]]
    assert [(batch.size, batch.flush) for _, batch, _ in seen] == [(MANY, "full"), (3, "due")]


def test_a_synchronous_body_runs_in_a_thread_of_its_own(app, serve) -> None:
    seen: list[Any] = []
    squares = squarer(app, is_async=False, seen=seen, max_batch_size=4)()
    serve()
    assert together(squares.square(2)) == [4]
    assert seen[0][2].startswith("gw-batch-square")


def test_an_exception_in_the_answer_fails_that_input_alone(app, serve) -> None:
    squares = squarer(app, is_async=True, seen=[], max_batch_size=4)()
    serve()
    first, failed, last = together(*(squares.square(x) for x in (1, -2, 3)))
    assert (first, last) == (1, 9)
    with pytest.raises(ValueError, match="bad -2"):
        raise failed


def test_the_calls_that_are_made_before_the_clock_moves_share_one_batch(app) -> None:
    """However many they are: the loop that serves them has not come to most of them yet."""
    seen: list[Any] = []
    squares = squarer(app, is_async=True, seen=seen, max_batch_size=1000, wait_ms=1)()
    clock = FakeClock()
    with in_process(app, clock=clock):
        waited_for(clock, *(squares.square(x) for x in range(500)))
    assert [len(xs) for xs, _, _ in seen] == [500]


def test_keys_and_parameters_are_kept_apart_and_self_sees_its_own(app) -> None:
    seen: list[Any] = []
    clock = FakeClock()

    @app.cls
    class Scaled:
        scale: int = gw.parameter(default=1)

        @gw.method()
        @gw.batched(max_batch_size=8, wait_ms=1, key=lambda x: x % 2)
        async def times(self, xs: list[int]) -> list[int]:
            seen.append((self.scale, xs))
            return [x * self.scale for x in xs]

    plain, tenfold = Scaled(), Scaled(scale=10)
    calls = [one.times(x) for one in (plain, tenfold) for x in range(4)]
    with in_process(app, clock=clock):
        assert waited_for(clock, *calls) == [0, 1, 2, 3, 0, 10, 20, 30]
    assert sorted(seen) == [(1, [0, 2]), (1, [1, 3]), (10, [0, 2]), (10, [1, 3])]


def test_nothing_is_due_until_the_fake_clock_says_so(app) -> None:
    seen: list[Any] = []
    squares = squarer(app, is_async=True, seen=seen, max_batch_size=8, wait_ms=20)()
    clock = FakeClock()

    async def main() -> None:
        first = asyncio.ensure_future(squares.square(2))
        assert await clock.armed() == pytest.approx(0.02)
        clock.advance(0.015)
        second = asyncio.ensure_future(squares.square(3))
        done, _ = await asyncio.wait([first, second], timeout=0.1)
        assert not done
        clock.advance(0.005)
        assert await asyncio.wait_for(asyncio.gather(first, second), 10) == [4, 9]

    with in_process(app, clock=clock):
        asyncio.run(main())
    ((xs, batch, _),) = seen
    assert xs == [2, 3]
    assert batch.waited == pytest.approx((0.02, 0.005))


def test_one_that_stops_waiting_leaves_the_batch(app) -> None:
    seen: list[Any] = []
    squares = squarer(app, is_async=True, seen=seen, max_batch_size=2, wait_ms=600_000)()
    clock = FakeClock()

    async def main() -> None:
        leaving = asyncio.ensure_future(squares.square(1))
        await clock.armed()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        staying = [squares.square(x) for x in (2, 3)]
        assert await asyncio.wait_for(asyncio.gather(*staying), 10) == [4, 9]

    with in_process(app, clock=clock):
        asyncio.run(main())
    assert [xs for xs, _, _ in seen] == [[2, 3]]


def test_delay_and_remote_wait_for_others_as_they_would_in_a_replica(app, serve) -> None:
    seen: list[Any] = []
    squares = squarer(app, is_async=True, seen=seen, max_batch_size=8, wait_ms=5)()
    serve()
    assert squares.square.delay(2).get() == 4
    assert squares.square.remote(3) == 9
    assert [batch.size for _, batch, _ in seen] == [1, 1]


def test_an_input_keeps_its_own_request_while_it_gathers(app, serve) -> None:
    """What surrounds the body, such as its parent's id, is each input's own."""

    @app.remote
    @gw.batched(max_batch_size=4)
    async def echo(xs: list[Any]) -> list[Any]:
        return xs

    @app.remote
    async def parent(x: int) -> Any:
        own = current_task.request.id
        answer = await echo.aremote(x)
        assert current_task.request.id == own
        return answer

    serve()
    assert together(*(parent(x) for x in range(3))) == [0, 1, 2]


def test_inner_blocks_keep_the_batchers_of_the_outer_one_and_put_back_what_they_change(
    app, serve
) -> None:
    seen: list[Any] = []
    squares = squarer(app, is_async=True, seen=seen, max_batch_size=2, wait_ms=600_000)()
    serve()
    clock = FakeClock()
    with in_process(app, clock=clock), in_process(gw.App("inner", celery=app.celery)):

        async def main() -> None:
            waiting = asyncio.ensure_future(squares.square(2))
            await clock.armed()
            clock.advance(600)
            assert await asyncio.wait_for(waiting, 10) == 4

        asyncio.run(main())
    assert together(squares.square(2), squares.square(3)) == [4, 9]


def test_what_served_eagerly_before_gathers_inside_the_block_only(celery_app) -> None:
    sizes: list[int] = []
    app = gw.App("unit", celery=celery_app)

    @app.remote
    @gw.batched(max_batch_size=2, wait_ms=600_000)
    async def body(xs: list[int]) -> list[int]:
        sizes.append(len(xs))
        return xs

    celery_app.conf.task_always_eager = True
    body.remote(1)
    with in_process(app):
        together(body(1), body(2))
    together(body(1), body(2))
    assert sizes == [1, 2, 1, 1]
