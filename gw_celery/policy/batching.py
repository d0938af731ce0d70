"""Forms batches from waiting inputs in a replica; pure.

A batch is formed only when the service is free to run it: while the model is busy, inputs gather at
no cost. A batch closes when it is full, or when its oldest input has waited long enough. A timer
that flushes at a fixed rate, as in celery-batches, forms small batches that queue behind a slow
model.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Hashable
from typing import Generic, TypeVar


class Flush(enum.StrEnum):
    #: It is full.
    FULL = "full"
    #: Its oldest input has waited for ``wait_ms``, or one must not wait.
    DUE = "due"
    #: The replica drains.
    DRAIN = "drain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits of one call, and how long its oldest input waits for others."""

    size: int
    #: Seconds.
    wait: float
    #: Maximum sum of the inputs' costs; ``None``: no limit.
    cost: int | None = None

    def halved(self, size: int) -> Bounds:
        """Return smaller bounds, after ``size`` inputs exceeded the device's memory."""
        return dataclasses.replace(self, size=min(self.size, max(1, size // 2)))


@dataclasses.dataclass(eq=False, kw_only=True)
class Waiting:
    key: Hashable
    since: float
    cost: int = 0
    #: Whether it does not wait for others.
    is_urgent: bool = False


W = TypeVar("W", bound=Waiting)


@dataclasses.dataclass(frozen=True)
class Batch(Generic[W]):
    """The inputs of one call, oldest first."""

    members: list[W]
    flush: Flush


class Buffers(Generic[W]):
    """The waiting inputs of one batched method, separate for each key."""

    def __init__(self) -> None:
        #: In order of arrival; a key without inputs is deleted.
        self._by_key: dict[Hashable, collections.deque[W]] = {}

    def put(self, waiting: W) -> None:
        self._by_key.setdefault(waiting.key, collections.deque()).append(waiting)

    def remove(self, waiting: W) -> bool:
        """Remove an input; return whether it was here."""
        buffer = self._by_key.get(waiting.key)
        if buffer is None or waiting not in buffer:
            return False
        buffer.remove(waiting)
        if not buffer:
            del self._by_key[waiting.key]
        return True

    def next_batch(
        self, bounds: Bounds, now: float, *, is_draining: bool = False
    ) -> Batch[W] | None:
        """Remove and return the batch that a free service should run now, or ``None``.

        Of several due batches, it is the one with the oldest input.

        Args:
            bounds: the limits of one call.
            now: the time in seconds, by the clock of ``Waiting.since``.
            is_draining: whether the replica drains, so that inputs do not wait for others.
        """
        due = [
            (buffer, flush)
            for buffer in self._by_key.values()
            if (flush := _flush(buffer, bounds, now, is_draining)) is not None
        ]
        if not due:
            return None
        buffer, flush = min(due, key=lambda pair: pair[0][0].since)
        members = _take(buffer, bounds)
        if not buffer:
            del self._by_key[members[0].key]
        return Batch(members, flush)

    def due_in(self, bounds: Bounds, now: float) -> float | None:
        """Return the seconds until a batch is due if nothing changes; ``None`` without inputs."""
        oldest = min((buffer[0].since for buffer in self._by_key.values()), default=None)
        return None if oldest is None else max(0.0, oldest + bounds.wait - now)


def _flush(
    buffer: collections.deque[W], bounds: Bounds, now: float, is_draining: bool
) -> Flush | None:
    """Return why a batch of these inputs is due now; ``None`` if it is not."""
    if len(buffer) >= bounds.size:
        return Flush.FULL
    # Fewer inputs than a full batch, so that the sum is short.
    if bounds.cost is not None and sum(waiting.cost for waiting in buffer) >= bounds.cost:
        return Flush.FULL
    if is_draining:
        return Flush.DRAIN
    # The same formula as in `due_in`, so that a timer is not early by a rounding error.
    if buffer[0].since + bounds.wait <= now or any(waiting.is_urgent for waiting in buffer):
        return Flush.DUE
    return None


def _take(buffer: collections.deque[W], bounds: Bounds) -> list[W]:
    """Remove the inputs of one call, oldest first; one that exceeds the cost limit goes alone."""
    members: list[W] = []
    cost = 0
    while buffer and len(members) < bounds.size:
        cost += buffer[0].cost
        if members and bounds.cost is not None and cost > bounds.cost:
            break
        members.append(buffer.popleft())
    return members
