"""What a body raises that is no exception, and what only passes through it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import greenlet
import pytest

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.runtime import body_guard


class Panic(BaseException):
    """As a library written in Rust raises."""


RAISED = [
    Panic("index out of bounds"),
    BaseExceptionGroup("two", [Panic(), ValueError()]),
    GeneratorExit(),
    asyncio.CancelledError(),
    greenlet.GreenletExit(),
    SystemExit(3),
]


def contained(act: Callable[[], Any]) -> None:
    with body_guard.Contained():
        act()


def raising(exc: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise exc

    return act


@pytest.mark.parametrize("exc", RAISED, ids=repr)
def test_a_synchronous_body_fails_with_what_it_raised(exc: BaseException) -> None:
    with pytest.raises(errors.BodyExited) as caught:
        contained(raising(exc))
    assert caught.value.__cause__ is exc
    assert repr(exc) in str(caught.value)


@pytest.mark.parametrize("exc", RAISED, ids=repr)
def test_an_asynchronous_body_fails_with_what_it_raised(exc: BaseException) -> None:
    async def body() -> None:
        with body_guard.Contained():
            await asyncio.sleep(0)
            raise exc

    with pytest.raises(errors.BodyExited) as caught:
        asyncio.run(body())
    assert caught.value.__cause__ is exc


@pytest.mark.parametrize(
    "exc", [ValueError(), execution.Revoked(), execution.HardLimit(3)], ids=repr
)
def test_an_error_and_what_stops_a_body_pass(exc: BaseException) -> None:
    with pytest.raises(type(exc)) as caught:
        contained(raising(exc))
    assert caught.value is exc


def test_a_cancellation_from_outside_passes() -> None:
    async def body() -> None:
        with body_guard.Contained():
            await asyncio.Event().wait()

    async def main() -> bool:
        task = asyncio.create_task(body())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())


def test_a_body_that_is_closed_at_its_wait_ends_without_a_word() -> None:
    seen: list[str] = []

    async def body() -> None:
        try:
            with body_guard.Contained():
                await asyncio.get_running_loop().create_future()
        except BaseException as exc:
            seen.append(type(exc).__name__)
            raise

    async def main() -> None:
        coroutine = body()

        async def step() -> None:
            coroutine.send(None)

        await asyncio.create_task(step())
        coroutine.close()

    asyncio.run(main())
    assert seen == ["GeneratorExit"]


def test_a_greenlet_that_is_stepped_no_more_ends_without_a_log_line() -> None:
    seen: list[str] = []

    def body() -> None:
        try:
            with body_guard.Contained():
                greenlet.getcurrent().parent.switch()
        except BaseException as exc:
            seen.append(type(exc).__name__)
            raise

    async def main() -> None:
        kept: list[greenlet.greenlet] = []

        async def step() -> None:
            kept.append(greenlet.greenlet(body))
            kept[0].switch()

        await asyncio.create_task(step())
        kept.clear()

    asyncio.run(main())
    assert seen == ["GreenletExit"]
