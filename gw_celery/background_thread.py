"""A thread that does the same again and again until its process ends."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time


class Outage:
    """One log line when something stops working, and one when it works again.

    Args:
        logger: of the module whose work it is.
        what: what cannot be done meanwhile, as the beginning of a sentence.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._since: float | None = None

    def begin(self, exc: BaseException) -> None:
        """It has failed."""
        if self._since is None:
            self._since = time.monotonic()
            self._logger.warning("%s: %r; tried again until it works", self._what, exc)

    def end(self) -> None:
        """It has worked."""
        if self._since is not None:
            seconds = time.monotonic() - self._since
            self._logger.warning("this outage is over after %.0f s: %s", seconds, self._what)
            self._since = None


class BackgroundThread:
    """Calls ``run_round`` once a period, in a daemon thread; a subclass says what a round is.

    Args:
        name: of the thread.
        outage: what is logged as not working while rounds raise.
        period: seconds from the start of one round to that of the next; ``math.inf`` for a thread
            that waits until it is woken. A change counts from the next round.
    """

    def __init__(self, name: str, outage: str, *, period: float = 1.0) -> None:
        self.period = period
        self._name = name
        self._outage = Outage(logging.getLogger(type(self).__module__), outage)
        self._thread: threading.Thread | None = None
        # Both may be entered again by the handler of a signal, which ends the pool.
        self._starting = threading.RLock()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_closed = False

    def run_round(self) -> None:
        """Do it once. What it raises is logged once for an outage, and the next round comes."""
        raise NotImplementedError

    def leave(self) -> None:
        """Do what is to be done last, after the last round."""

    def start(self) -> None:
        """Start the thread, unless it runs already or is closed."""
        with self._starting:
            if self._thread is None and not self.is_closed:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def wake(self) -> None:
        """Have the next round begin at once; from any thread."""
        if self._wakes.empty():
            self._wakes.put(None)

    def close(self, timeout: float = 2.0) -> bool:
        """End the thread after its round; whether it has ended.

        Args:
            timeout: seconds to wait for it. One that hangs is left behind: it is a daemon.
        """
        with self._starting:
            self.is_closed = True
        self.wake()
        if self._thread is None or self._thread.ident is None:
            return True  # it ends as soon as it begins
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self.is_closed:
            began = time.monotonic()
            try:
                self.run_round()
            except Exception as exc:
                self._outage.begin(exc)
            else:
                self._outage.end()
            left = began + self.period - time.monotonic()
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=None if left > threading.TIMEOUT_MAX else max(0.0, left))
                while True:
                    self._wakes.get_nowait()
        try:
            self.leave()
        except Exception as exc:
            self._outage.begin(exc)
