"""The thread that sees when a replica's loop is late, and says which task keeps it.

The loop cannot: while something blocks it none of its timers run.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from gw_celery.runtime import loop

logger = logging.getLogger(__name__)

#: Seconds that the loop may be late before it is said.
LIMIT = 1.0
#: Seconds between two complaints at least.
_SILENCE = 10.0
_REMEDY = "put what computes or blocks into `await asyncio.to_thread(...)`, or into a plain `def`"
#: Names that are listed of what may be to blame.
_MOST_NAMES = 3
_LIBRARIES = tuple(
    path
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class Watch:
    """Looks at the loop a few times in the time that it may be late.

    Args:
        host: the loop; ``start`` is called on it.
        in_flight: names the inputs that this process holds.
        limit: seconds that the loop may be late.
        silence: seconds between two complaints at least.
    """

    def __init__(
        self,
        host: loop.Host,
        in_flight: Callable[[], Iterable[str]],
        limit: float = LIMIT,
        silence: float = _SILENCE,
    ) -> None:
        self._host = host
        self._in_flight = in_flight
        self._limit = limit
        self._silence = silence
        self._interval = limit / 4
        self._turned_at = time.monotonic()
        #: Whether this episode was told, and when one was.
        self._is_told = False
        self._told_at: float | None = None
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin; the thread ends with the process, or with ``stop``."""
        self._turn()
        threading.Thread(target=self._run, name="gw-lag", daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _turn(self) -> None:
        """The loop runs: what was told of is over, and what was not seen is told now."""
        now = time.monotonic()
        late = now - self._turned_at - self._interval
        if late > self._limit and not self._is_told:
            # The thread could not run either.
            self._tell(late, now, f"a call held the GIL; in flight: {self._suspects()}")
        self._turned_at, self._is_told = now, False
        if not self._is_over.is_set():
            self._host.loop.call_later(self._interval, self._turn)

    def _run(self) -> None:
        while not self._is_over.wait(self._interval):
            now = time.monotonic()
            late = now - self._turned_at - self._interval
            if late > self._limit and not self._is_told:
                self._tell(late, now, self._culprit())

    def _tell(self, late: float, now: float, culprit: str) -> None:
        self._is_told = True
        if self._told_at is not None and now - self._told_at < self._silence:
            return
        self._told_at = now
        logger.warning(
            "pid %d: the event loop is %.1f s late, because of %s; %s",
            os.getpid(),
            late,
            culprit,
            _REMEDY,
        )

    def _culprit(self) -> str:
        """The task whose step the loop runs, and the line that it is at."""
        running, stack = self._host.running_task(), self._host.stack()
        name = "" if running is None else running.get_name()
        if not name or name.startswith("Task-"):  # one that a body created has no name of its own
            name = f"{name or 'a callback'} (in flight: {self._suspects()})"
        return f"{name}, at {_place(stack)}" if stack else name

    def _suspects(self) -> str:
        names = sorted(self._in_flight())
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return (", ".join(names[:_MOST_NAMES]) or "nothing") + more


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line that is not a library's."""
    own = [frame for frame in stack if not frame.filename.startswith(_LIBRARIES)]
    last = own[-1] if own else stack[-1]
    return f"{last.filename}:{last.lineno} in {last.name}"
