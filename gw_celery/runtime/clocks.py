"""Where a batcher takes its time from, so that a test can move it by hand."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Something that will be called, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The present time, in seconds since any point, and callbacks on the running loop."""

    def now(self) -> float: ...

    def call_at(
        self, when: float, callback: Callable[[], object], context: contextvars.Context
    ) -> Timer:
        """Call ``callback`` on the running loop, in ``context``, once it is ``when``."""


class Monotonic:
    """The clock of this machine, as its loops have it."""

    def now(self) -> float:
        return time.monotonic()

    def call_at(
        self, when: float, callback: Callable[[], object], context: contextvars.Context
    ) -> Timer:
        # By the delay: a loop may count from another point than this clock.
        delay = max(0.0, when - self.now())
        return asyncio.get_running_loop().call_later(delay, callback, context=context)
