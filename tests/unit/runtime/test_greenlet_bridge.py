from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import greenlet
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.runtime import body as body_runtime
from gw_celery.runtime import greenlet_bridge, loop

LONG = 60.0
colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


@pytest.fixture
def thread() -> Iterator[loop.Host]:
    thread = loop.Host()
    thread.start()
    yield thread
    thread.stop(5)


def call(
    thread: loop.Host, coroutine: Coroutine[Any, Any, Any], **limits: float
) -> greenlet_bridge.LoopCall[Any]:
    return greenlet_bridge.LoopCall(thread.loop, coroutine, **limits)


def run(thread: loop.Host, coroutine: Coroutine[Any, Any, Any]) -> Any:
    return call(thread, coroutine).run(LONG)


class Body:
    """A coroutine that waits until it is interrupted, and notes what it saw."""

    def __init__(self, *, answers: bool = False) -> None:
        self.began = threading.Event()
        self.saw: list[str] = []
        self.answers = answers

    async def inner(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.saw.append("inner was cancelled")
            raise

    async def run(self) -> str:
        waited_for = asyncio.create_task(self.inner())
        await asyncio.sleep(0)
        self.began.set()
        try:
            await waited_for
        except SoftTimeLimitExceeded:
            self.saw.append("soft limit")
            if self.answers:
                return "partial"
            raise
        except asyncio.CancelledError:
            self.saw.append("cancelled")
            raise
        return "never"


def test_a_coroutine_runs_on_the_loop_and_its_answer_comes_back(thread: loop.Host) -> None:
    async def body() -> tuple[int, bool]:
        await asyncio.sleep(0)
        return 25, thread.is_current()

    assert run(thread, body()) == (25, True)
    assert not thread.is_current()


def test_an_error_comes_back_as_itself(thread: loop.Host) -> None:
    error = KeyError("x")

    async def body() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(KeyError) as caught:
        run(thread, body())
    assert caught.value is error


def once(began: threading.Event, exc: BaseException) -> Callable[[], None]:
    """Raise ``exc`` in the waiting thread, as a signal does, once the body runs."""
    left = [exc]

    def interrupt() -> None:
        if left and began.wait(LONG):
            raise left.pop()

    return interrupt


def interrupted(thread: loop.Host, body: Body, exc: BaseException) -> Any:
    return call(thread, body.run()).run(LONG, once(body.began, exc))


def test_a_soft_limit_is_raised_in_the_coroutine_and_cancels_what_it_awaits(
    thread: loop.Host,
) -> None:
    body = Body()
    limit = SoftTimeLimitExceeded(3)

    with pytest.raises(SoftTimeLimitExceeded) as caught:
        interrupted(thread, body, limit)

    assert caught.value is limit
    assert body.saw == ["inner was cancelled", "soft limit"]


def test_a_coroutine_may_answer_after_a_soft_limit(thread: loop.Host) -> None:
    assert interrupted(thread, Body(answers=True), SoftTimeLimitExceeded()) == ("partial")


def test_a_body_can_await_again_after_a_soft_limit(thread: loop.Host) -> None:
    began = threading.Event()

    async def body() -> int:
        try:
            began.set()
            await asyncio.Event().wait()
        except SoftTimeLimitExceeded:
            async with asyncio.timeout(LONG):
                await asyncio.sleep(0)
        task = asyncio.current_task()
        return task.cancelling() if task else -1

    assert call(thread, body()).run(LONG, once(began, SoftTimeLimitExceeded())) == 0


def test_an_interruption_before_the_first_step_is_raised_as_itself(thread: loop.Host) -> None:
    async def body() -> None:
        raise AssertionError("started")

    release = threading.Event()
    thread.loop.call_soon_threadsafe(release.wait, LONG)
    limits = [SoftTimeLimitExceeded(1)]

    def interrupt() -> None:
        """The loop is busy until both the start and the interruption are in its queue."""
        if limits:
            raise limits.pop()
        release.set()

    with pytest.raises(SoftTimeLimitExceeded):
        call(thread, body()).run(LONG, interrupt)


def test_a_hard_limit_answers_at_once_and_cancels_the_coroutine(thread: loop.Host) -> None:
    body = Body()
    with pytest.raises(execution.HardLimit):
        call(thread, body.run(), hard_limit=0.05).run(LONG)

    assert run(thread, asyncio.sleep(0, body.saw)) == ["inner was cancelled", "cancelled"]


def test_what_interrupts_the_waiting_thread_cancels_the_coroutine(thread: loop.Host) -> None:
    body = Body()
    with pytest.raises(KeyboardInterrupt):
        interrupted(thread, body, KeyboardInterrupt())

    assert body.saw == ["inner was cancelled", "cancelled"]


def test_what_stops_the_input_does_not_wait_for_a_coroutine_that_goes_on(
    thread: loop.Host,
) -> None:
    began, may_end = threading.Event(), asyncio.Event()

    async def body() -> None:
        while not may_end.is_set():
            began.set()
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()

    start = time.monotonic()
    with pytest.raises(execution.Revoked):
        call(thread, body()).run(LONG, once(began, execution.Revoked()))
    assert time.monotonic() - start < LONG / 2
    thread.loop.call_soon_threadsafe(may_end.set)
    assert run(thread, asyncio.sleep(0, "alive")) == "alive"


@pytest.mark.parametrize("exc", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_in_a_body_fails_that_body_and_leaves_the_loop_alive(
    thread: loop.Host, exc: BaseException
) -> None:
    async def body() -> None:
        await asyncio.sleep(0)
        raise exc

    with pytest.raises(errors.BodyExited, match=type(exc).__name__) as caught:
        run(thread, body())

    assert caught.value.__cause__ is exc
    assert run(thread, asyncio.sleep(0, "alive")) == "alive"


def test_an_exit_in_a_background_task_leaves_the_loop_alive(thread: loop.Host, caplog) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    async def body() -> None:
        task = asyncio.create_task(leave())
        await asyncio.wait([task])
        with pytest.raises(SystemExit):
            task.result()

    run(thread, body())
    assert run(thread, asyncio.sleep(0, "alive")) == "alive"
    assert "background task" in caplog.text


def test_a_body_that_cancels_itself_fails_with_the_reason(thread: loop.Host) -> None:
    async def body() -> None:
        raise asyncio.CancelledError

    async def body_of_a_task() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(errors.BodyExited, match="CancelledError"):
        run(thread, body())
    with pytest.raises(errors.GWCeleryError, match="cancelled its own task"):
        run(thread, body_of_a_task())


def test_context_variables_of_the_caller_are_seen_and_kept_apart(thread: loop.Host) -> None:
    async def nested() -> str:
        return colour.get()

    async def body() -> tuple[str, str]:
        seen = colour.get()
        colour.set("set in the body")
        await asyncio.sleep(0)
        return seen, await asyncio.create_task(nested())

    token = colour.set("set by the caller")
    try:
        assert run(thread, body()) == ("set by the caller", "set in the body")
        assert colour.get() == "set by the caller"
    finally:
        colour.reset(token)


def test_a_sync_call_inside_a_body_can_wait_for_the_loop(thread: loop.Host) -> None:
    went_on = asyncio.Event()

    async def other() -> None:
        went_on.set()

    async def nested() -> str:
        beside = asyncio.create_task(other())
        await went_on.wait()
        await beside
        return f"nested in {colour.get()}"

    def sync() -> str:
        return greenlet_bridge.drive(nested())

    async def body() -> str:
        colour.set("the body")
        return f"{sync()}, {sync()}"

    assert run(thread, body()) == "nested in the body, nested in the body"


def test_an_error_of_a_nested_sync_call_is_raised_where_it_was_called(
    thread: loop.Host,
) -> None:
    async def nested() -> None:
        await asyncio.sleep(0)
        raise ValueError("nested")

    async def body() -> str:
        try:
            greenlet_bridge.drive(nested())
        except ValueError as exc:
            return str(exc)
        return "no error"

    assert run(thread, body()) == "nested"


def test_a_soft_limit_reaches_a_nested_sync_call(thread: loop.Host) -> None:
    inner = Body()

    async def body() -> str:
        try:
            greenlet_bridge.drive(inner.run())
        except SoftTimeLimitExceeded:
            return "caught outside"
        return "missed"

    limit = once(inner.began, SoftTimeLimitExceeded())
    assert call(thread, body()).run(LONG, limit) == "caught outside"
    assert inner.saw == ["inner was cancelled", "soft limit"]


def test_a_sync_call_in_a_task_that_the_body_created_is_refused(thread: loop.Host) -> None:
    async def nested() -> None:
        raise AssertionError("started")

    async def child() -> None:
        greenlet_bridge.drive(nested())

    async def body() -> None:
        await asyncio.gather(child())

    with pytest.raises(errors.BlockingCallError, match=r"write `await task\(...\)`"):
        run(thread, body())


def test_a_timeout_of_the_body_is_its_own(thread: loop.Host) -> None:
    async def body() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "missed"

    assert run(thread, body()) == "timed out"


# -- a body that is stepped no more --


def test_a_body_that_is_closed_at_its_wait_ends_without_a_word() -> None:
    seen: list[str] = []

    async def body() -> None:
        try:
            with body_runtime.Contained():
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
            with body_runtime.Contained():
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
