"""Sees that an event loop is late, or that a load blocks it, and names the task and the line.

The loop cannot: while something blocks it none of its timers run. A thread watches a loop that
serves; a load is watched by the thread that waits for it.
"""

from __future__ import annotations

import logging
import math
import os
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

from gw_celery import errors
from gw_celery.runtime import lifecycle, loop

logger = logging.getLogger(__name__)

_REMEDY = "put what computes or blocks into `await asyncio.to_thread(...)`, or into a plain `def`"
#: Inputs that are named where any of them may be to blame.
_MAX_NAMES = 3
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Watchdog:
    """Logs that the loop ``host`` is late; ``in_flight`` names the inputs of this process."""

    #: Seconds that the loop may be late before it is logged.
    limit = 1.0
    #: Seconds between two lines at least.
    silence = 10.0

    def __init__(self, host: loop.Host, in_flight: Callable[[], Iterable[str]]) -> None:
        self._host = host
        self._in_flight = in_flight
        self._interval = self.limit / 4
        self._turned_at, self._logged_at = time.monotonic(), -math.inf
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin, on the loop; the thread ends with the process, or with ``stop``."""
        self._turn()
        threading.Thread(target=self._run, name="gw-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _turn(self) -> None:
        if late := self._unlogged():  # the thread could not run either
            self._log(late, f"a call held the GIL; in flight: {self._suspects()}")
        self._turned_at = time.monotonic()
        if not self._is_over.is_set():
            self._host.loop.call_later(self._interval, self._turn)

    def _run(self) -> None:
        while not self._is_over.wait(self._interval):
            if late := self._unlogged():
                self._log(late, self._culprit())

    def _unlogged(self) -> float:
        """Seconds that the loop is late; 0.0 within the limit, and where it has been logged."""
        now = time.monotonic()
        late = now - self._turned_at - self._interval
        is_quiet = self._logged_at >= self._turned_at or now - self._logged_at < self.silence
        return 0.0 if is_quiet or late <= self.limit else late

    def _log(self, late: float, culprit: str) -> None:
        self._logged_at = time.monotonic()
        text = "pid %d: the event loop is %.1f s late, because of %s; %s"
        logger.warning(text, os.getpid(), late, culprit, _REMEDY)

    def _culprit(self) -> str:
        running, place = self._host.running_task(), _place(self._host.stack())
        name = "" if running is None else running.get_name()
        if not name or name.startswith("Task-"):  # one that a body created has no name of its own
            name = f"{name or 'a callback'} (in flight: {self._suspects()})"
        return f"{name}, at {place}"

    def _suspects(self) -> str:
        names = sorted(self._in_flight())
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return (", ".join(names[:_MAX_NAMES]) or "nothing") + more


def blocked_load(
    host: loop.Host, entering: Sequence[lifecycle.Entered], timeout: float
) -> errors.StartupError:
    """Log what blocks ``host`` while it loads ``entering``, and return it as an error."""
    running, stack = host.running_task(), host.stack()
    late = [life for life in entering if not life.value.done()]
    named = [life for life in late if life.is_life(running)]  # none: a task that one of them made
    names = [life.name for life in named or late] or ["the event loop"]
    why = (
        f"still blocks the event loop after gw_start_timeout={timeout:.0f} s, at {_place(stack)}: "
        f"load in `await asyncio.to_thread(...)`, or in a plain `def`"
    )
    lines = "".join(stack.format())
    logger.error("pid %d: %s %s; it is at:\n%s", os.getpid(), ", ".join(names), why, lines)
    return errors.StartupError(dict.fromkeys(names, TimeoutError(why)))


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line that is not a library's."""
    own = [frame for frame in stack if not frame.filename.startswith(_LIBRARIES)]
    return "".join(f"{at.filename}:{at.lineno} in {at.name}" for at in (own or stack)[-1:]) or "?"
