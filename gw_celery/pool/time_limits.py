"""When running inputs reach their limits; no clock, no I/O."""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gw_celery.pool.request import PoolRequest

#: Stale entries that are not worth a clean-up.
_SLACK = 256


class Limit(enum.Enum):
    """What an input has reached."""

    SOFT = "soft"
    HARD = "hard"
    #: It was stopped and should be gone by now.
    GRACE = "grace"


class Limits:
    """A heap of limits; entries of what ended, or was stopped, before its limit are stale."""

    def __init__(self) -> None:
        #: When, a number that breaks ties, the input, and which limit.
        self._heap: list[tuple[float, int, PoolRequest, Limit]] = []
        self._count = itertools.count()
        #: From which number on the entries of an input count.
        self._first: dict[int, int] = {}
        #: When each input that runs reaches its hard limit; infinite without one.
        self._hard: dict[int, float] = {}

    def begin(self, request: PoolRequest, now: float) -> None:
        """The input starts: its limits count from here."""
        self._hard[request.number] = now + (request.hard_limit or math.inf)
        if request.soft_limit:
            self._add(now + request.soft_limit, request, Limit.SOFT)
        if request.hard_limit:
            self._add(now + request.hard_limit, request, Limit.HARD)

    def expect_gone(self, request: PoolRequest, when: float) -> None:
        """The input was stopped; its child has until ``when`` to let go of it."""
        self.forget(request)
        self._add(when, request, Limit.GRACE)

    def forget(self, request: PoolRequest) -> None:
        self._first.pop(request.number, None)
        self._hard.pop(request.number, None)
        # Inputs end long before their limits: without this, the heap would hold minutes of them.
        if len(self._heap) > _SLACK + 4 * len(self._first):
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget every limit."""
        self._heap.clear()
        self._first.clear()
        self._hard.clear()

    def due(self, now: float) -> Iterator[tuple[PoolRequest, Limit]]:
        """Yield what has reached a limit, once."""
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._is_live(entry):
                yield entry[2], entry[3]

    def next_in(self, now: float) -> float | None:
        """Seconds until the next limit; ``None`` when there is none."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - now) if self._heap else None

    def longest_left(self, requests: Iterable[PoolRequest], now: float) -> float:
        """Seconds until the last of ``requests`` that run reaches its hard limit.

        Infinite where one has none. What has not begun has no time of its own yet.
        """
        return max((self._hard.get(request.number, now) - now for request in requests), default=0.0)

    def _add(self, when: float, request: PoolRequest, limit: Limit) -> None:
        number = next(self._count)
        self._first.setdefault(request.number, number)
        heapq.heappush(self._heap, (when, number, request, limit))

    def _is_live(self, entry: tuple[float, int, PoolRequest, Limit]) -> bool:
        return entry[1] >= self._first.get(entry[2].number, math.inf)
