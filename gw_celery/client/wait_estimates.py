"""How long an input would wait in a queue, as workers have published it, read once a second."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from gw_celery.client import publisher
from gw_celery.protocol import headers
from gw_celery.transport import find

#: Seconds that Redis has to answer a caller, who then goes without an estimate.
_PATIENCE = 0.25
#: Seconds that an estimate, or that there is none, is good for.
_FRESH = 1.0
#: Maximum age in seconds of an estimate on an event loop, where it is refreshed by a thread.
_USABLE = 5.0
#: Seconds that the exit of a process waits for what is being read.
_FAREWELL = 2 * _PATIENCE


class Waits:
    """The estimates of one app's queues in this process."""

    def __init__(
        self, shared: find.SharedRedis | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._shared = shared
        self._now = now
        self._known: dict[str, tuple[float | None, float]] = {}
        #: Held by the thread that reads; others go by what is known meanwhile.
        self._reading = threading.Lock()
        self._making = threading.Lock()
        self._reader: publisher.Publisher | None = None
        self.pid = os.getpid()

    def estimate(self, queue: str) -> float | None:
        """Return the seconds that an input sent now would wait; ``None`` where none is known.

        On an event loop it goes by what is known, and has it read anew by a thread.
        """
        if self._shared is None:
            return None
        found, at = self._known.get(queue, (None, -_USABLE))
        age = self._now() - at
        if age < _FRESH:
            return found
        if not _is_on_loop():
            return self._read(queue)
        reader = self._started()
        if not reader.backlog:
            reader.submit(lambda: self._read(queue))
        return found if age < _USABLE else None

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close(_FAREWELL)

    def _read(self, queue: str) -> float | None:
        if self._shared is None or not self._reading.acquire(blocking=False):
            return self._known.get(queue, (None, 0.0))[0]
        try:
            text = self._shared.client().get(self._shared.key("wait", queue))
            # One that cannot be true, as a workload could not, is none.
            found = None if text is None else headers.workload(float(text))
        except Exception:  # Redis is away, or the value is no estimate: the call is admitted
            self._shared.close()
            found = None
        finally:
            self._reading.release()
        self._known[queue] = (found, self._now())
        return found

    def _started(self) -> publisher.Publisher:
        with self._making:
            if self._reader is None:
                self._reader = publisher.Publisher(1)
                atexit.register(self.close)
            return self._reader


_of_apps: weakref.WeakKeyDictionary[Any, Waits] = weakref.WeakKeyDictionary()
_finding = threading.Lock()


def of(app: Any) -> Waits:
    """Return the estimates of ``app``; nothing connects."""
    found = _of_apps.get(app)
    if found is None or found.pid != os.getpid():  # a fork does not copy threads
        with _finding:
            found = _of_apps[app] = Waits(find.redis_of(app, _PATIENCE))
    return found


def _is_on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
