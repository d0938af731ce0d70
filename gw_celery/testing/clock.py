"""A clock that a test moves by hand."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import threading
import time
from collections.abc import Callable

from gw_celery.runtime import batcher

#: Seconds: a sum of floats may miss the moment that it means by less than this.
_TOLERANCE = 1e-9
#: Seconds of real time between two looks at whether a timer is set.
_INTERVAL = 0.001
#: Seconds of real time that another thread's loop has to take its next two turns.
_LONGEST_TURNS = 10.0


@dataclasses.dataclass(eq=False)
class _Timer:
    when: float
    loop: asyncio.AbstractEventLoop
    ring: Callable[[], object]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeClock(batcher.Clock):
    """Stands still until ``advance``; what waits for a time is called when that has come.

    Any thread may use it, whatever loop the timers are of.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[_Timer] = []
        self._changing = threading.Lock()

    def now(self) -> float:
        """Return the seconds that the clock was advanced by."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass at once. What was waiting for them runs in its loop's next turn.

        What was handed to that loop before, such as the calls of a ``gather``, begins before the
        time passes, so that the sizes of batches do not depend on the speed of the machine.

        Raises:
            TimeoutError: when something blocks that loop.
        """
        if not seconds >= 0:
            raise ValueError(f"advance({seconds!r}): time goes forwards, give 0 or more seconds")
        with self._changing:
            loops = {timer.loop for timer in self._timers}
        for loop in loops:
            _let_begin(loop)
        with self._changing:
            self._now += seconds
            due = [timer for timer in self._timers if self._reaches(timer.when)]
            self._timers = [timer for timer in self._timers if timer not in due]
        for timer in sorted(due, key=lambda timer: timer.when):
            timer.ring()

    async def armed(self, timeout: float = 10.0) -> float:
        """Wait until something waits for the time to pass; return the seconds until the first.

        Raises:
            TimeoutError: when nothing does after ``timeout`` seconds of real time.
        """
        deadline = time.monotonic() + timeout
        while (first := self._first()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing waits for this clock after {timeout} s")
            await asyncio.sleep(_INTERVAL)
        return first - self._now

    def call_at(
        self, when: float, callback: Callable[[], object], context: contextvars.Context
    ) -> _Timer:
        """Call ``callback`` on the running loop, in ``context``, once it is ``when``.

        Args:
            when: time by this clock, in seconds.
            callback: called without arguments.
            context: what it runs in.
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

    def _first(self) -> float | None:
        with self._changing:
            self._timers = [timer for timer in self._timers if not timer.is_cancelled]
            return min((timer.when for timer in self._timers), default=None)

    def _reaches(self, when: float) -> bool:
        """Whether it is ``when``; a clock that comes a rounding error short is put right."""
        if when > self._now + _TOLERANCE:
            return False
        self._now = max(self._now, when)
        return True


def _let_begin(loop: asyncio.AbstractEventLoop) -> None:
    """Wait for two turns of another thread's loop: one makes a task, the next one begins it."""
    if loop is asyncio._get_running_loop():
        return
    has_turned = threading.Event()
    loop.call_soon_threadsafe(loop.call_soon, has_turned.set)
    if not has_turned.wait(_LONGEST_TURNS):
        raise TimeoutError(f"something has blocked the event loop for {_LONGEST_TURNS} s")
