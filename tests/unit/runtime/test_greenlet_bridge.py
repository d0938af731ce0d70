from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.runtime import greenlet_bridge, loop

LONG = 60.0
colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


@pytest.fixture
def thread() -> Iterator[loop.LoopThread]:
    thread = loop.LoopThread("gw-test")
    thread.start()
    yield thread
    thread.stop(5)


def call(
    thread: loop.LoopThread, coroutine: Coroutine[Any, Any, Any]
) -> greenlet_bridge.LoopCall[Any]:
    return greenlet_bridge.LoopCall(thread.loop, coroutine)


def run(thread: loop.LoopThread, coroutine: Coroutine[Any, Any, Any]) -> Any:
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


def test_a_coroutine_runs_on_the_loop_and_its_answer_comes_back(thread: loop.LoopThread) -> None:
    async def body() -> tuple[int, bool]:
        await asyncio.sleep(0)
        return 25, thread.is_current()

    assert run(thread, body()) == (25, True)
    assert not thread.is_current()


def test_an_error_comes_back_as_itself(thread: loop.LoopThread) -> None:
    error = KeyError("x")

    async def body() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(KeyError) as caught:
        run(thread, body())
    assert caught.value is error


def interrupted(thread: loop.LoopThread, body: Body, exc: BaseException) -> Any:
    running = call(thread, body.run())

    def interrupt() -> None:
        body.began.wait(LONG)
        running.interrupt(exc)

    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        return running.run(LONG)
    finally:
        helper.join()


def test_a_soft_limit_is_raised_in_the_coroutine_and_cancels_what_it_awaits(
    thread: loop.LoopThread,
) -> None:
    body = Body()
    limit = SoftTimeLimitExceeded(3)

    with pytest.raises(SoftTimeLimitExceeded) as caught:
        interrupted(thread, body, limit)

    assert caught.value is limit
    assert body.saw == ["inner was cancelled", "soft limit"]


def test_a_coroutine_may_answer_after_a_soft_limit(thread: loop.LoopThread) -> None:
    assert interrupted(thread, Body(answers=True), SoftTimeLimitExceeded()) == ("partial")


def test_a_body_can_await_again_after_a_soft_limit(thread: loop.LoopThread) -> None:
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

    running = call(thread, body())
    helper = threading.Thread(
        target=lambda: (began.wait(LONG), running.interrupt(SoftTimeLimitExceeded()))
    )
    helper.start()
    assert running.run(LONG) == 0
    helper.join()


def test_an_interruption_before_the_first_step_is_raised_as_itself(
    thread: loop.LoopThread,
) -> None:
    async def body() -> None:
        raise AssertionError("started")

    release = threading.Event()
    thread.loop.call_soon_threadsafe(release.wait, LONG)
    running = call(thread, body())
    limit = SoftTimeLimitExceeded(1)

    def interrupt() -> None:
        """The loop is busy until both the start and the interruption are in its queue."""
        running.interrupt(limit)
        release.set()

    with pytest.raises(SoftTimeLimitExceeded) as caught:
        running.run(LONG, interrupt)
    assert caught.value is limit


def test_a_hard_limit_answers_at_once_and_cancels_the_coroutine(thread: loop.LoopThread) -> None:
    body = Body()
    with pytest.raises(execution.HardLimit):
        call(thread, body.run()).run(LONG, hard_limit=0.05)

    assert run(thread, asyncio.sleep(0, body.saw)) == ["inner was cancelled", "cancelled"]


def test_what_interrupts_the_waiting_thread_cancels_the_coroutine(
    thread: loop.LoopThread, monkeypatch
) -> None:
    body = Body()
    running = call(thread, body.run())

    def interrupt() -> None:
        """As a signal does, once the body runs."""
        body.began.wait(LONG)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(LONG, interrupt)

    assert body.saw == ["inner was cancelled", "cancelled"]


def test_what_stops_the_input_does_not_wait_for_a_coroutine_that_goes_on(
    thread: loop.LoopThread,
) -> None:
    began, may_end = threading.Event(), asyncio.Event()

    async def body() -> None:
        while not may_end.is_set():
            began.set()
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()

    def revoke() -> None:
        began.wait(LONG)
        raise execution.Revoked

    running = call(thread, body())
    start = time.monotonic()
    with pytest.raises(execution.Revoked):
        running.run(LONG, revoke)
    assert time.monotonic() - start < LONG / 2
    thread.loop.call_soon_threadsafe(may_end.set)
    assert run(thread, asyncio.sleep(0, "alive")) == "alive"


def test_a_soft_limit_in_the_waiting_thread_reaches_the_coroutine(thread: loop.LoopThread) -> None:
    body = Body(answers=True)
    running = call(thread, body.run())

    def limit() -> None:
        if "soft limit" not in body.saw and body.began.wait(LONG):
            raise SoftTimeLimitExceeded

    assert running.run(LONG, limit) == "partial"
    assert body.saw == ["inner was cancelled", "soft limit"]


@pytest.mark.parametrize("exc", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_in_a_body_fails_that_body_and_leaves_the_loop_alive(
    thread: loop.LoopThread, exc: BaseException
) -> None:
    async def body() -> None:
        await asyncio.sleep(0)
        raise exc

    with pytest.raises(errors.BodyExited, match=type(exc).__name__) as caught:
        run(thread, body())

    assert caught.value.__cause__ is exc
    assert run(thread, asyncio.sleep(0, "alive")) == "alive"


def test_an_exit_in_a_background_task_leaves_the_loop_alive(
    thread: loop.LoopThread, caplog
) -> None:
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


def test_a_body_that_cancels_itself_fails_with_the_reason(thread: loop.LoopThread) -> None:
    async def body() -> None:
        raise asyncio.CancelledError

    async def body_of_a_task() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(errors.BodyExited, match="CancelledError"):
        run(thread, body())
    with pytest.raises(errors.GWCeleryError, match="cancelled itself"):
        run(thread, body_of_a_task())


def test_context_variables_of_the_caller_are_seen_and_kept_apart(thread: loop.LoopThread) -> None:
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


def test_a_sync_call_inside_a_body_can_wait_for_the_loop(thread: loop.LoopThread) -> None:
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
    thread: loop.LoopThread,
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


def test_a_soft_limit_reaches_a_nested_sync_call(thread: loop.LoopThread) -> None:
    inner = Body()

    async def body() -> str:
        try:
            greenlet_bridge.drive(inner.run())
        except SoftTimeLimitExceeded:
            return "caught outside"
        return "missed"

    running = call(thread, body())
    helper = threading.Thread(
        target=lambda: (inner.began.wait(LONG), running.interrupt(SoftTimeLimitExceeded()))
    )
    helper.start()
    assert running.run(LONG) == "caught outside"
    helper.join()
    assert inner.saw == ["inner was cancelled", "soft limit"]


def test_a_sync_call_in_a_task_that_the_body_created_is_refused(thread: loop.LoopThread) -> None:
    async def nested() -> None:
        raise AssertionError("started")

    async def child() -> None:
        greenlet_bridge.drive(nested())

    async def body() -> None:
        await asyncio.gather(child())

    with pytest.raises(errors.BlockingCallError, match=r"write `await task\(...\)`"):
        run(thread, body())


def test_a_timeout_of_the_body_is_its_own(thread: loop.LoopThread) -> None:
    async def body() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "missed"

    assert run(thread, body()) == "timed out"
