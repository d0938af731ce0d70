"""Serves an App in the process of a test, with a clock that the test moves by hand."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from gw_celery import errors
from gw_celery.app import App
from gw_celery.client import execution
from gw_celery.runtime import batcher
from gw_celery.runtime import in_process as runtime_in_process

#: Tolerance in seconds for the rounding error of a sum of durations.
_TOLERANCE = 1e-9
#: Seconds of real time between two checks for a timer.
_INTERVAL = 0.001
#: Seconds of real time that the loop of another thread may take for its next two turns.
_LONGEST_TURNS = 10.0


@contextlib.contextmanager
def in_process(app: App, *, clock: batcher.Clock | None = None) -> Iterator[None]:
    """Serve everything that ``app`` declares in this process until the block ends.

    Contexts and ``on_enter`` hooks are entered when the block begins, and exited when the outermost
    such block ends. Inside, ``.delay()``, ``.remote()``, ``await`` and canvas run the bodies here,
    through the same serializer. Inputs of batched methods gather as in a replica.

    Args:
        app: the App to serve.
        clock: the clock by which batches wait; default: the real one. Give a ``FakeClock`` to
            control it.

    Raises:
        StartupError: if a context or hook fails; it has every cause.
    """
    conf = app.celery.conf
    is_outermost = execution.current() is None
    runtime = runtime_in_process.started(app.celery)
    before = conf.task_always_eager, runtime.batchers
    conf.task_always_eager = True
    if runtime.batchers is None or clock is not None:
        runtime.batchers = batcher.Batchers(clock=clock or batcher.Clock())
    try:
        runtime.enter([app.registry], list(app.registry.services.values()))
        yield
    finally:
        conf.task_always_eager, runtime.batchers = before
        if is_outermost:
            execution.stop()


@dataclasses.dataclass(eq=False)
class _Timer:
    when: float
    loop: asyncio.AbstractEventLoop
    ring: Callable[[], object]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeClock(batcher.Clock):
    """A clock for batches that moves only by ``advance``.

    Any thread may use it; each timer runs on the loop that set it.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[_Timer] = []
        self._changing = threading.Lock()

    def now(self) -> float:
        """Return the sum of all advances in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock; the timers that are due run in the next turn of their loops.

        A call that the loop of another thread has received, such as one of a ``gather``, begins
        before the clock moves. The speed of the machine therefore cannot change the batches.

        Args:
            seconds: seconds to add, 0 or more.

        Raises:
            CallTimeout: if something blocks that loop for 10 seconds.
        """
        if not seconds >= 0:
            raise errors.UsageError(f"advance({seconds!r}): time goes forwards: give 0 or more")
        with self._changing:
            loops = {timer.loop for timer in self._timers}
        for loop in loops - {asyncio._get_running_loop()}:
            # A loop of another thread: the first turn creates the asyncio task, the second begins
            # it.
            has_turned = threading.Event()
            loop.call_soon_threadsafe(loop.call_soon, has_turned.set)
            if not has_turned.wait(_LONGEST_TURNS):
                raise errors.CallTimeout(
                    f"the event loop is blocked for {_LONGEST_TURNS} s: use await"
                )
        with self._changing:
            self._now += seconds
            due = [timer for timer in self._timers if self._reaches(timer.when)]
            self._timers = [timer for timer in self._timers if timer not in due]
        for timer in sorted(due, key=lambda timer: timer.when):
            timer.ring()

    async def armed(self, timeout: float = 10.0) -> float:
        """Wait until a timer is set.

        Args:
            timeout: seconds of real time to wait.

        Returns:
            The seconds until the first timer is due.

        Raises:
            CallTimeout: if no timer is set after ``timeout`` seconds of real time.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._changing:
                self._timers = [timer for timer in self._timers if not timer.is_cancelled]
                if self._timers:
                    return min(timer.when for timer in self._timers) - self._now
            if time.monotonic() > deadline:
                raise errors.CallTimeout(
                    f"nothing waits for this clock after {timeout} s: call first"
                )
            await asyncio.sleep(_INTERVAL)

    def call_at(
        self, when: float, callback: Callable[[], object], context: contextvars.Context
    ) -> _Timer:
        """Call ``callback`` on the running loop at the time ``when``; batchers use this.

        Args:
            when: time of this clock in seconds.
            callback: called without arguments.
            context: the context in which it runs.

        Returns:
            The timer, which has a method ``cancel``.
        """
        loop = asyncio.get_running_loop()
        timer = _Timer(when, loop, lambda: loop.call_soon_threadsafe(run, context=context))

        def run() -> None:
            if not timer.is_cancelled:
                callback()

        with self._changing:
            is_due = self._reaches(when)
            if not is_due:
                self._timers.append(timer)
        if is_due:
            timer.ring()
        return timer

    def _reaches(self, when: float) -> bool:
        """Return whether the clock has reached ``when``; correct the clock's rounding error."""
        if when > self._now + _TOLERANCE:
            return False
        self._now = max(self._now, when)
        return True
