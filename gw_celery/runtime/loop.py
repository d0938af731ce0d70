"""The event loop of a process that serves, the threads of sync hooks, and the loop's watchdog.

On prefork and solo, Celery needs the main thread. The loop has its own thread, so that background
work of a context continues between tasks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import math
import os
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from gw_celery import errors
from gw_celery.runtime import lifecycle

T = TypeVar("T")

logger = logging.getLogger(__name__)

_REMEDY = "put what computes or blocks into `await asyncio.to_thread(...)`, or into a plain `def`"
#: Maximum number of inputs named as possible causes.
_MAX_NAMES = 3
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Host:
    """A loop and its thread: the caller's if ``hosted`` is given, else a new one."""

    def __init__(self, hosted: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = hosted or asyncio.new_event_loop()
        self._thread = threading.current_thread()
        if hosted is None:
            self._thread = threading.Thread(target=self._run, name="gw-loop", daemon=True)
        self._is_stopping = False
        _hosts.add(self)

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self, timeout: float) -> None:
        """Cancel the remaining asyncio tasks and end the loop, within ``timeout`` seconds."""
        self._is_stopping = True
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout)

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def answers(self, within: float) -> bool:
        """Return whether the loop turns ``within`` seconds; False if something blocks it."""
        answered = threading.Event()
        self.loop.call_soon_threadsafe(answered.set)
        return answered.wait(within)

    def stack(self) -> traceback.StackSummary:
        """Return the current stack of the loop's thread, innermost call last."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return traceback.extract_stack(frame) if frame else traceback.StackSummary()

    def end_in_fork(self) -> None:
        """In a fork: end the process when the callback that forked awaits or returns.

        Otherwise the fork would run every input of the loop a second time.
        """
        if self.is_current() and self.loop.is_running():
            for handle in getattr(self.loop, "_ready", ()):  # asyncio has no public way
                handle.cancel()
            self.loop.call_soon(os._exit, 0)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not self._is_stopping:
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as exc:
                    # An asyncio task that a body created raised it. asyncio lets it end the loop,
                    # which must continue.
                    logger.error("pid %d: a background task raised %r; ignored", os.getpid(), exc)
            rest = asyncio.all_tasks(self.loop)
            for task in rest:
                task.cancel()
            if rest:
                self.loop.run_until_complete(asyncio.wait(rest, timeout=1.0))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()


_hosts: weakref.WeakSet[Host] = weakref.WeakSet()


def _end_fork() -> None:
    for host in _hosts:
        host.end_in_fork()


os.register_at_fork(after_in_child=_end_fork)


class Tasks:
    """Holds asyncio tasks that nothing awaits, because asyncio keeps only weak references."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        coroutine: Coroutine[Any, Any, None],
        name: str,
        context: contextvars.Context | None = None,
    ) -> None:
        """Run ``coroutine`` on the running loop; default context: the caller's."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> frozenset[asyncio.Task[None]]:
        for task in self._tasks:
            task.cancel()
        return frozenset(self._tasks)


async def in_thread(fn: Callable[..., T], *args: Any) -> T:
    """Run a sync hook in a new daemon thread and return its result.

    A thread of the default executor would delay the exit of a failed process until the hook ends.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    # Giving up the wait must not cancel the future: the thread continues, and sets its outcome.
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(fn(*args))
        except StopIteration as exc:  # cannot pass a future
            future.set_exception(
                errors.BodyExited(f"a hook raised {exc!r}: raise another Exception")
            )
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name=f"gw-hook-{fn.__qualname__}", daemon=True).start()
    return await asyncio.wrap_future(future)


class Watchdog:
    """Logs that the loop of ``host`` is late; ``in_flight`` returns the names of current inputs.

    A thread watches the loop, because no timer of a blocked loop runs.
    """

    #: Seconds by which the loop may be late before a log line.
    limit = 1.0
    #: Minimum seconds between two log lines.
    silence = 10.0

    def __init__(self, host: Host, in_flight: Callable[[], Iterable[str]]) -> None:
        self._host = host
        self._in_flight = in_flight
        self._interval = self.limit / 4
        self._turned_at, self._logged_at = time.monotonic(), -math.inf
        self._is_over = threading.Event()

    def start(self) -> None:
        """Start on the loop; the thread ends with the process or with ``stop``."""
        self._turn()
        threading.Thread(target=self._run, name="gw-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _turn(self) -> None:
        # If a call held the GIL, the thread could not run either.
        self._look(lambda: f"a call held the GIL; in flight: {self._suspects()}")
        self._turned_at = time.monotonic()
        if not self._is_over.is_set():
            self._host.loop.call_later(self._interval, self._turn)

    def _run(self) -> None:
        while not self._is_over.wait(self._interval):
            self._look(self._culprit)

    def _look(self, culprit: Callable[[], str]) -> None:
        now = time.monotonic()
        late = now - self._turned_at - self._interval
        has_logged = self._logged_at >= self._turned_at or now - self._logged_at < self.silence
        if late > self.limit and not has_logged:
            self._logged_at = now
            text = "pid %d: the event loop is %.1f s late, because of %s; %s"
            logger.warning(text, os.getpid(), late, culprit(), _REMEDY)

    def _culprit(self) -> str:
        running, place = asyncio.current_task(self._host.loop), _place(self._host.stack())
        name = "" if running is None else running.get_name()
        if not name or name.startswith("Task-"):  # created by a body, without a name
            name = f"{name or 'a callback'} (in flight: {self._suspects()})"
        return f"{name}, at {place}"

    def _suspects(self) -> str:
        names = sorted(self._in_flight())
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return (", ".join(names[:_MAX_NAMES]) or "nothing") + more


def blocked_load(
    host: Host, entering: Sequence[lifecycle.Entered], timeout: float
) -> errors.StartupError:
    """Log what blocks ``host`` while it loads ``entering``, and return it as an error."""
    running, stack = asyncio.current_task(host.loop), host.stack()
    late = [life for life in entering if not life.value.done()]
    named = [life for life in late if life.task is running]  # none: a task that one created
    names = [life.name for life in named or late] or ["the event loop"]
    why = (
        f"still blocks the event loop after gw_start_timeout={timeout:.0f} s, at {_place(stack)}: "
        f"load in `await asyncio.to_thread(...)`, or in a plain `def`"
    )
    logger.error(
        "pid %d loads for too long: %s %s. Its stack:\n%s",
        *(os.getpid(), ", ".join(names), why, "".join(stack.format())),
    )
    return errors.StartupError(dict.fromkeys(names, TimeoutError(why)))


def _place(stack: traceback.StackSummary) -> str:
    own = [frame for frame in stack if not frame.filename.startswith(_LIBRARIES)]
    return "".join(f"{at.filename}:{at.lineno} in {at.name}" for at in (own or stack)[-1:]) or "?"
