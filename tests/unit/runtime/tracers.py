"""What stands for Celery's tracer and for its inputs in the tests of a replica."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from gw_celery.replica import tracer
from gw_celery.runtime import greenlet_bridge

DEADLINE = 30.0


class Around:
    """What surrounds work in a thread; notes in which."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return fn(*args, **kwargs)


def run(act: Callable[[], Awaitable[Any]]) -> Any:
    """Run ``act`` on a loop of its own, for a limited time."""

    async def main() -> Any:
        async with asyncio.timeout(DEADLINE):
            return await act()

    return asyncio.run(main())


def stepped(fn: Callable[[], Any]) -> Any:
    """Run ``fn`` as Celery's tracer runs for an asynchronous body."""
    return run(lambda: greenlet_bridge.step(fn))


class Reports:
    """Keeps what a replica's child reports to its parent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def report(self, *report: Any) -> None:
        self.sent.append(report)


def an_input(link: Reports | None = None, **facts: Any) -> tracer.Input:
    return tracer.Input(1, "proj.embed", "id-1", link or Reports(), **facts)


def keep(outcome: Callable[[], Any]) -> Any:
    """What ``outcome`` returns or raises."""
    try:
        return outcome()
    except BaseException as exc:
        return exc
