"""The thread that waits for a load, and gives up where the loop itself cannot.

The loop enforces ``gw_start_timeout``, unless what loads blocks it: a ``torch.load`` written into
an ``async def``. No timer runs then; the thread that waits sees it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from gw_celery import errors
from gw_celery.runtime import lifecycle, loop

logger = logging.getLogger(__name__)


class Vigil:
    """Asked a few times a second during a load, it raises when the wait should end.

    Args:
        host: the loop that loads.
        entering: what is being entered; it changes with the load.
        start_timeout: seconds after which a blocked loop is given up.
        grace: seconds that the loop then has to show that it is not blocked.
        check: raises when the process should not wait any more.
    """

    def __init__(
        self,
        host: loop.Host,
        entering: Sequence[lifecycle.Entered],
        *,
        start_timeout: float,
        grace: float,
        check: Callable[[], None],
    ) -> None:
        self._host = host
        self._entering = entering
        self._start_timeout = start_timeout
        self._grace = grace
        self._check = check
        self._deadline = time.monotonic() + start_timeout
        #: Whether it gave up because of the loop.
        self.saw_blocked_loop = False

    def __call__(self) -> None:
        """Return when the load may go on.

        Raises:
            StartupError: naming what blocks the loop, at or after the deadline.
        """
        self._check()
        if time.monotonic() < self._deadline or self._host.answers(self._grace):
            return
        self.saw_blocked_loop = True
        stack = self._host.stack()
        logger.error(
            "pid %d: the event loop is blocked, at:\n%s", os.getpid(), "".join(stack.format())
        )
        where = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "?"
        late = TimeoutError(
            f"still blocks the event loop after gw_start_timeout={self._start_timeout:.0f} s, "
            f"at {where}: load in `await asyncio.to_thread(...)`, or in a plain `def`"
        )
        raise errors.StartupError(dict.fromkeys(self._blockers(), late))

    def _blockers(self) -> list[str]:
        """Who runs on the loop; all that are late where a task of theirs runs."""
        running = self._host.running_task()
        late = [life for life in self._entering if not life.value.done()]
        named = [life for life in late if life.is_life(running)]
        return [life.unit.name for life in named or late] or ["the event loop"]
