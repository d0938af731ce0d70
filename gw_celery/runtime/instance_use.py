"""One call's use of a loaded instance, for a caller that may stop waiting at any moment."""

from __future__ import annotations

import threading
from typing import Any

from gw_celery.runtime import instances
from gw_celery.types import ParameterValues


class Use:
    """Counts one use at most and gives it back, also where a load ends after its caller gave up."""

    def __init__(self, owner: instances.Instances, values: ParameterValues) -> None:
        self._owner = owner
        self._values = values
        self._loaded: instances.Loaded | None = None
        self._is_over = False
        # Reentrant: an exception that is raised in a thread can interrupt `end` itself.
        self._lock = threading.RLock()

    def take(self) -> bool:
        """Use a suitable instance that is there; whether one was. From any thread."""
        self._loaded = self._owner.take(self._values)
        return self._loaded is not None

    async def load(self) -> None:
        """Use a suitable instance once there is one; on the loop."""
        loaded = await self._owner.load(self._values)
        with self._lock:
            if not self._is_over:
                self._loaded = loaded
                return
        self._owner.give_back(loaded)

    def view(self) -> Any:
        """The object that the call sees."""
        if self._loaded is None:
            raise RuntimeError("nothing was taken or loaded")
        return self._owner.view(self._loaded, self._values)

    def end(self) -> None:
        """Give back what is used; from any thread."""
        with self._lock:
            self._is_over = True
            loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._owner.give_back(loaded)
