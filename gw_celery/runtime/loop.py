"""An event loop on a thread of its own, and sync hooks in theirs.

A process that serves has one such loop for as long as it lives. Stock pools keep the main thread
(prefork, solo) for Celery, so the loop has one to itself: what a context started goes on between
two tasks.
"""

from __future__ import annotations

import asyncio
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
    """A loop and the thread that runs it."""

    def __init__(self, hosted: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self.loop = hosted
        self._thread = thread

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
    """Owns the thread and its loop; ``stop`` ends both."""

    def __init__(self, name: str = "gw-loop") -> None:
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        super().__init__(asyncio.new_event_loop(), thread)
        self._is_stopping = False

    def start(self) -> None:
        self._thread.start()

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


class MainLoop(Host):
    """The running loop of a process whose main thread it has; whoever made it ends it."""

    def __init__(self, running: asyncio.AbstractEventLoop) -> None:
        super().__init__(running, threading.current_thread())

    def start(self) -> None:
        """Do nothing: it runs."""

    def stop(self, timeout: float) -> None:
        """Do nothing."""


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
