"""An event loop on a thread of its own, and sync hooks in theirs.

A process that serves has one such loop for as long as it lives. Stock pools keep the main thread
(prefork, solo) or many (threads) for Celery, so the loop has one to itself: what a context
started goes on between two tasks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LoopThread:
    """Owns the thread and its loop; ``stop`` ends both."""

    def __init__(self, name: str = "gw-loop") -> None:
        self.loop = asyncio.new_event_loop()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_current(self) -> bool:
        """Whether the caller runs on this loop's thread."""
        return threading.current_thread() is self._thread

    def stop(self, timeout: float) -> None:
        """End the loop, cancelling what is left on it; waits ``timeout`` seconds at most."""
        self._is_stopping = True
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not self._is_stopping:
                self._run_until_stopped()
            self._cancel_rest()
        finally:
            self.loop.close()

    def _run_until_stopped(self) -> None:
        try:
            self.loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as exc:
            # A task that a body created raised it; asyncio lets it out of the loop, which
            # must outlive it.
            logger.error("%r was raised in a background task and is ignored", exc)

    def _cancel_rest(self) -> None:
        rest = asyncio.all_tasks(self.loop)
        for task in rest:
            task.cancel()
        if rest:
            self.loop.run_until_complete(asyncio.wait(rest, timeout=1.0))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())


async def in_thread(fn: Callable[..., T], *args: Any) -> T:
    """Run a sync hook in a daemon thread of its own and return what it returned.

    The default executor would keep a failed process from exiting until a slow load is over.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], Any]
        try:
            outcome = (future.set_result, fn(*args))
        except BaseException as exc:
            outcome = (future.set_exception, _raisable(exc))
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            return  # the loop was closed: nobody waits for this hook any more

    threading.Thread(target=run, name=f"gw-hook-{fn.__qualname__}", daemon=True).start()
    return await future


def _raisable(exc: BaseException) -> BaseException:
    """A StopIteration cannot cross a future."""
    return RuntimeError(repr(exc)) if isinstance(exc, StopIteration) else exc
