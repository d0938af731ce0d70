"""One call from its sending to its answer: within its time, on a loop or on a thread.

Callers without a loop wait on a short-lived one, so that there is one way to wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from celery._state import get_current_task, task_join_will_block

from gw_celery import errors
from gw_celery.client import watcher

T = TypeVar("T")


async def call(app: Any, send: watcher.Send, task_name: str, timeout: float | None) -> watcher.Meta:
    """Send a call, wait for its answer, and return its record; ``timeout`` is for both.

    Raises:
        CallTimeout: when no answer came in ``timeout`` seconds.
    """
    watch, result = watcher.watcher(app), None
    async with _in_time(timeout, lambda: _too_late(task_name, result, timeout)):
        result = await watch.publish(send)
        return await watch.answered(result)


async def answer(result: Any, task_name: str, timeout: float | None) -> watcher.Meta:
    """Wait for the answer of a call that was sent, and return its record.

    A cancelled wait, or one over ``timeout`` seconds, revokes the task.

    Raises:
        CallTimeout: when no answer came in ``timeout`` seconds.
    """
    watch = watcher.watcher(result.app)
    async with _in_time(timeout, lambda: _too_late(task_name, result, timeout)):
        return await watch.answered(result)


def send_now(app: Any, send: watcher.Send, task_name: str, timeout: float | None) -> Any:
    """Send a call and return its ``AsyncResult``.

    Raises:
        CallTimeout: when it could not be sent in ``timeout`` seconds.
    """
    watch = watcher.watcher(app)
    sending = watch.submit(send)
    if not concurrent.futures.wait([sending], timeout).done:
        watch.give_up(sending)
        raise errors.CallTimeout(_too_late(task_name, None, timeout))
    return sending.result()


def block(waits: Coroutine[Any, Any, T]) -> T:
    """Run ``waits`` to its end on this thread; the caller has made sure that it may."""
    # With a factory, the runner leaves the thread's own event loop alone.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(waits)


def require_may_block(what: str) -> None:
    """Refuse to block where that would stop a loop or hold a worker.

    Raises:
        BlockingCallError: on a running event loop, or inside a task.
    """
    if _has_loop():
        raise errors.BlockingCallError(
            f"{what} would block the running event loop: await it instead"
        )
    if task_join_will_block() and get_current_task() is not None:
        raise errors.BlockingCallError(
            f"{what} inside a task would hold a worker while it waits for another one: chain the "
            f"tasks, or `await` it in an asynchronous task"
        )


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextlib.asynccontextmanager
async def _in_time(timeout: float | None, too_late: Callable[[], str]) -> AsyncIterator[None]:
    bound = asyncio.timeout(timeout)
    try:
        async with bound:
            yield
    except TimeoutError as exc:
        if not bound.expired():  # a broker's client has time-outs, too
            raise
        raise errors.CallTimeout(too_late()) from exc


def _too_late(task_name: str, result: Any, timeout: float | None) -> str:
    if result is None:
        return (
            f"{task_name} could not be sent within {timeout} s: does the broker answer? (give "
            f"more with .options(timeout=...))"
        )
    return (
        f"{task_name}[{result.id}] was not answered within {timeout} s and was revoked; is a "
        f"worker consuming its queue? (give more with .options(timeout=...))"
    )
