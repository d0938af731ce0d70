"""Start what one turn of a caller's loop began in one turn of another loop.

Calls that are made together, as by ``asyncio.gather``, then arrive together, however slow the
machine is.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

#: What each loop has begun in its present turn.
_begun: dict[asyncio.AbstractEventLoop, list[_Crossing]] = {}


async def run(to: asyncio.AbstractEventLoop, make: Callable[[], Awaitable[Any]]) -> Any:
    """Await what ``make`` returns on the loop ``to``, in the context of the caller."""
    crossing, here = _Crossing(to, make), asyncio.get_running_loop()
    if here is to:
        return await crossing.start()
    if here not in _begun:
        here.call_soon(_start_all, here)
    _begun.setdefault(here, []).append(crossing)
    try:
        return await asyncio.wrap_future(crossing.answer)
    except asyncio.CancelledError:
        to.call_soon_threadsafe(crossing.stop)
        raise


def _start_all(here: asyncio.AbstractEventLoop) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Crossing]] = {}
    for one in _begun.pop(here):
        by_loop.setdefault(one.to, []).append(one)
    for to, crossings in by_loop.items():
        try:
            to.call_soon_threadsafe(_start, crossings)
        except RuntimeError as exc:  # it was closed
            for one in crossings:
                one.answer.set_exception(exc)


def _start(crossings: list[_Crossing]) -> None:
    for one in crossings:
        if one.answer.set_running_or_notify_cancel():
            one.start().add_done_callback(one.settle)


class _Crossing:
    """One call from a loop to another, and its answer."""

    def __init__(self, to: asyncio.AbstractEventLoop, make: Callable[[], Awaitable[Any]]) -> None:
        self.to = to
        self.answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._make = make
        self._context = contextvars.copy_context()
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> asyncio.Task[Any]:
        async def made() -> Any:
            return await self._make()

        self._task = self.to.create_task(made(), context=self._context)
        return self._task

    def stop(self) -> None:
        """Cancel what has started, for a caller that no longer waits."""
        if self._task is not None:
            self._task.cancel()

    def settle(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.answer.set_exception(asyncio.CancelledError())
        elif exc := task.exception():
            self.answer.set_exception(exc)
        else:
            self.answer.set_result(task.result())
