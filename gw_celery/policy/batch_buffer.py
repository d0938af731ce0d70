"""Inputs that wait to share a call, those that must not be mixed apart; no clock, no I/O."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one call takes at most, and how long its oldest input waits for others."""

    size: int
    #: Seconds.
    wait: float
    #: Sum of the inputs' costs; ``None`` without a bound.
    cost: int | None = None


@dataclasses.dataclass(eq=False, kw_only=True)
class Waiting:
    """One input that waits, since the time ``since``."""

    payload: Any
    key: Hashable
    since: float
    cost: int = 0
    #: It waits for nobody.
    is_urgent: bool = False


class Buffer:
    """Inputs of one key, in the order of their arrival."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._cost = 0
        self._urgent = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest(self) -> float:
        """Since when the first input waits."""
        return self._waiting[0].since

    @property
    def has_urgent(self) -> bool:
        return self._urgent > 0

    def put(self, waiting: Waiting) -> None:
        self._waiting.append(waiting)
        self._count(waiting, 1)

    def remove(self, waiting: Waiting) -> bool:
        """Take out an input; whether it was there."""
        try:
            self._waiting.remove(waiting)
        except ValueError:
            return False
        self._count(waiting, -1)
        return True

    def fills(self, bounds: Bounds) -> bool:
        """Whether a call could take no more than what is here."""
        has_cost = bounds.cost is not None and self._cost >= bounds.cost
        return has_cost or len(self._waiting) >= bounds.size

    def take(self, bounds: Bounds) -> list[Waiting]:
        """Take out what one call may have, the oldest first; an input over the cost goes alone."""
        taken: list[Waiting] = []
        cost = 0
        while self._waiting and len(taken) < bounds.size:
            cost += self._waiting[0].cost
            if taken and bounds.cost is not None and cost > bounds.cost:
                break
            taken.append(self._waiting.popleft())
            self._count(taken[-1], -1)
        return taken

    def _count(self, waiting: Waiting, sign: int) -> None:
        self._cost += sign * waiting.cost
        self._urgent += sign * waiting.is_urgent


class Buffers:
    """The buffers of one batched method, by key; one that is empty is gone."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Buffer] = {}

    def __len__(self) -> int:
        return sum(map(len, self._buffers.values()))

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers.values())

    def put(self, waiting: Waiting) -> None:
        self._buffers.setdefault(waiting.key, Buffer()).put(waiting)

    def remove(self, waiting: Waiting) -> bool:
        """Take out an input; whether it was there."""
        buffer = self._buffers.get(waiting.key)
        if buffer is None or not buffer.remove(waiting):
            return False
        self._free(waiting.key, buffer)
        return True

    def take(self, buffer: Buffer, bounds: Bounds) -> list[Waiting]:
        taken = buffer.take(bounds)
        self._free(taken[0].key, buffer)
        return taken

    def _free(self, key: Hashable, buffer: Buffer) -> None:
        if not buffer:
            del self._buffers[key]
