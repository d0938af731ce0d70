from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator

import pytest

from gw_celery.client import together
from gw_celery.runtime.loop import LoopThread
from gw_celery.testing import eventually

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name")


@pytest.fixture
def other() -> Iterator[LoopThread]:
    made = LoopThread("other")
    made.start()
    yield made
    made.stop(5)


def test_what_one_turn_begins_starts_in_one_turn_of_the_other_loop(other) -> None:
    started: list[int] = []
    seen: list[int] = []

    async def call(number: int) -> int:
        if not started:  # it comes behind all that is ready now
            other.loop.call_soon(lambda: seen.append(len(started)))
        started.append(number)
        await asyncio.sleep(0)
        return number

    async def main() -> list[int]:
        return await asyncio.gather(
            *(together.run(other.loop, lambda number=number: call(number)) for number in range(500))
        )

    assert asyncio.run(main()) == list(range(500))
    assert seen == [500]


def test_the_context_and_the_outcome_cross(other) -> None:
    async def call() -> str:
        return NAME.get()

    async def failing() -> None:
        raise ValueError("over there")

    async def main() -> None:
        NAME.set("mine")
        assert await together.run(other.loop, call) == "mine"
        with pytest.raises(ValueError, match="over there"):
            await together.run(other.loop, failing)

    asyncio.run(main())


@pytest.mark.parametrize("has_begun", [False, True])
def test_one_that_is_not_waited_for_is_cancelled(other, has_begun: bool) -> None:
    began = threading.Event()

    async def call() -> None:
        began.set()
        await asyncio.Event().wait()

    async def main() -> None:
        waiting = asyncio.ensure_future(together.run(other.loop, call))
        await asyncio.sleep(0)
        if has_begun:
            assert await asyncio.to_thread(began.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    eventually(lambda: not asyncio.all_tasks(other.loop))


def test_a_loop_that_was_closed_fails_its_calls(other) -> None:
    other.stop(5)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            await together.run(other.loop, asyncio.Event().wait)

    asyncio.run(main())
