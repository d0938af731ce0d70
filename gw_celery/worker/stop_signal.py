"""How a process learns, while it loads or runs a body, that it should end."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

from billiard import common

logger = logging.getLogger(__name__)


def is_ending() -> bool:
    """Whether a signal has told this child of prefork to end.

    The handler of billiard then raises ``SystemExit`` in whatever body runs.
    """
    return bool(common._should_have_exited[0])


class Bell:
    """Rung once by a worker that stops, seen by each child that it forked.

    A child that loads has no ears for its pool yet, and its parent would wait for the load.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def ring(self) -> None:
        os.write(self._writer, b"!")

    def has_rung(self) -> bool:
        # Nobody reads the byte: it is there for all children.
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return bool(poll.poll(0))


@contextlib.contextmanager
def heeding(bell: Bell) -> Iterator[Callable[[], None]]:
    """Yield a check that raises ``SystemExit`` once the bell has rung or SIGTERM has come.

    By default SIGTERM ends a process at once, and what had entered would not be left.
    """
    told = threading.Event()
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, lambda number, frame: told.set())

    def check() -> None:
        if told.is_set() or bell.has_rung():
            logger.warning("pid %d should stop, so it gives up its load", os.getpid())
            raise SystemExit(0)

    try:
        yield check
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
