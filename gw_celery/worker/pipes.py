"""What a worker and the children that it forks tell each other while they load.

Their pool cannot: it hears of a child only once that has loaded, and tells it nothing before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """Why a child cannot serve."""

    pid: int
    reason: str


class Pipes:
    """Made before the fork: why children cannot load, and that their worker stops."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._stop_reader, self._stop_writer = os.pipe()

    def report(self, reason: str) -> None:
        """Tell the worker why this child cannot serve; short, so that it is one write."""
        os.write(self._writer, (json.dumps([os.getpid(), reason[:2000]]) + "\n").encode())

    def fileno(self) -> int:
        """Readable when a child has reported a failure."""
        return self._reader

    def never_wait(self) -> None:
        """Have ``failures`` return what is there from now on, and nothing when nothing is."""
        os.set_blocking(self._reader, False)

    def failures(self) -> list[Failure]:
        """Return what children have reported, waiting for it."""
        try:
            written = os.read(self._reader, 65536)
        except BlockingIOError:
            return []
        return [Failure(*json.loads(line)) for line in written.splitlines()]

    def stop(self) -> None:
        """Tell every child that loads to give up."""
        os.write(self._stop_writer, b"!")

    @contextlib.contextmanager
    def stop_check(self) -> Iterator[Callable[[], None]]:
        """Yield a check that raises ``SystemExit`` once the worker stops or SIGTERM has come.

        By default SIGTERM ends a process at once, and what had entered would not be left.
        """
        has_signal = threading.Event()
        is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if is_ours:
            signal.signal(signal.SIGTERM, lambda number, frame: has_signal.set())

        def check() -> None:
            # The byte is never read: it is there for all children.
            poll = select.poll()
            poll.register(self._stop_reader, select.POLLIN)
            if has_signal.is_set() or poll.poll(0):
                logger.warning("pid %d should stop, so it gives up its load", os.getpid())
                raise SystemExit(0)

        try:
            yield check
        finally:
            if is_ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
