"""A daemon thread that repeats a round until its process ends; the base of all our loops."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time


class Outage:
    """Logs one line when an operation starts to fail, and one when it works again.

    Args:
        logger: logger of the module that does the work.
        what: what does not work meanwhile, as the start of a log line.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._since: float | None = None

    def begin(self, exc: BaseException) -> None:
        """Record a failure, and log it if it is the first."""
        if self._since is None:
            self._since = time.monotonic()
            self._logger.warning("%s: %r; tried again until it works", self._what, exc)

    def end(self) -> None:
        """Record a success, and log the end of an outage."""
        if self._since is not None:
            seconds = time.monotonic() - self._since
            self._logger.warning("this outage is over after %.0f s: %s", seconds, self._what)
            self._since = None


class BackgroundThread:
    """Calls ``run_round`` once per period in a daemon thread; subclasses define the round.

    Args:
        name: name of the thread.
        outage: what does not work while rounds raise, as the start of a log line.
        period: seconds between the starts of two rounds; ``math.inf``: only ``wake`` starts the
            next round. A change applies after the next round.
    """

    def __init__(self, name: str, outage: str, *, period: float = 1.0) -> None:
        self.period = period
        self._name = name
        self._outage = Outage(logging.getLogger(type(self).__module__), outage)
        self._thread: threading.Thread | None = None
        # A signal handler that ends the pool may enter both methods again in the same thread.
        self._starting = threading.RLock()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_closed = False

    def run_round(self) -> None:
        """Do one round. An exception is logged once per outage, and rounds continue."""
        raise NotImplementedError

    def leave(self) -> None:
        """Clean up after the last round."""

    def start(self) -> None:
        with self._starting:
            if self._thread is None and not self.is_closed:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def wake(self) -> None:
        """Start the next round at once; call it from any thread."""
        if self._wakes.empty():
            self._wakes.put(None)

    def close(self, timeout: float = 2.0) -> bool:
        """End the thread after its current round.

        Args:
            timeout: seconds to wait; a thread that hangs is abandoned, because it is a daemon.

        Returns:
            Whether the thread has ended.
        """
        with self._starting:
            self.is_closed = True
        self.wake()
        if self._thread is None or self._thread.ident is None:
            return True  # it ends when it begins
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
