"""An event loop on a thread of its own, and sync hooks in theirs.

A process that serves has one such loop for as long as it lives. Stock pools keep the main thread
(prefork, solo) for Celery, so the loop has one to itself: what a context started goes on between
two tasks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Host:
    """A loop and the thread that runs it, the caller's; the code that made the loop ends it."""

    def __init__(
        self, hosted: asyncio.AbstractEventLoop, thread: threading.Thread | None = None
    ) -> None:
        self.loop = hosted
        self._thread = thread or threading.current_thread()

    def start(self) -> None:
        """Begin to run the loop, where it is ours."""

    def stop(self, timeout: float) -> None:
        """End the loop, where it is ours; waits ``timeout`` seconds at most."""

    def is_current(self) -> bool:
        """Whether the caller runs on this loop's thread."""
        return threading.current_thread() is self._thread

    def answers(self, within: float) -> bool:
        """Whether the loop takes its turn ``within`` seconds; False while something blocks it."""
        answered = threading.Event()
        self.loop.call_soon_threadsafe(answered.set)
        return answered.wait(within)

    def running_task(self) -> asyncio.Task[Any] | None:
        """The task whose step the loop runs right now; from any thread."""
        return asyncio.current_task(self.loop)

    def stack(self) -> traceback.StackSummary:
        """What the loop's thread is doing right now, the innermost call last."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return traceback.extract_stack(frame) if frame else traceback.StackSummary()


class LoopThread(Host):
    """Owns the thread and its loop; ``stop`` cancels what is left on it, and ends both."""

    def __init__(self, name: str = "gw-loop") -> None:
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        super().__init__(asyncio.new_event_loop(), thread)
        self._is_stopping = False

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
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


class Tasks:
    """Tasks that nothing awaits: asyncio itself keeps only weak references to them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        coroutine: Coroutine[Any, Any, None],
        name: str,
        context: contextvars.Context | None = None,
    ) -> None:
        """Run ``coroutine`` on the running loop, in the caller's context unless one is given."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> frozenset[asyncio.Task[None]]:
        """Cancel those that run, and return them."""
        for task in self._tasks:
            task.cancel()
        return frozenset(self._tasks)


async def in_thread(fn: Callable[..., T], *args: Any) -> T:
    """Run a sync hook in a daemon thread of its own and return what it returned.

    The default executor would keep a failed process from exiting until a slow load is over.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    # A wait that is given up must not cancel it: the thread goes on, and sets its outcome.
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(fn(*args))
        except StopIteration as exc:  # cannot cross a future
            future.set_exception(RuntimeError(repr(exc)))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name=f"gw-hook-{fn.__qualname__}", daemon=True).start()
    return await asyncio.wrap_future(future)
