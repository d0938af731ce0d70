"""The inputs that wait to share a call, and when a batch of them is due: late binding; pure.

A batch is formed only when the service is free to run it, and not before: while the model is busy,
inputs gather at no cost. It closes when it is full, or once its oldest input has waited for long
enough. A timer that flushes whatever is there, as celery-batches has it, makes small batches that
then queue behind a slow model.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Hashable
from typing import Generic, TypeVar


class Flush(enum.StrEnum):
    """Why a batch was closed."""

    #: It can take no more.
    FULL = "full"
    #: Its oldest input waited for ``wait_ms``, or must not wait.
    DUE = "due"
    #: The replica takes nothing new.
    DRAIN = "drain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits of one call, and how long its oldest input waits for others."""

    size: int
    #: Seconds.
    wait: float
    #: Sum of the inputs' costs; ``None`` without a bound.
    cost: int | None = None

    def halved(self, size: int) -> Bounds:
        """Return the bounds after a call of ``size`` inputs ran out of the device's memory."""
        return dataclasses.replace(self, size=min(self.size, max(1, size // 2)))


@dataclasses.dataclass(eq=False, kw_only=True)
class Waiting:
    """One input that waits, since the time ``since``."""

    key: Hashable
    since: float
    cost: int = 0
    #: It does not wait for others.
    is_urgent: bool = False


W = TypeVar("W", bound=Waiting)


@dataclasses.dataclass(frozen=True)
class Batch(Generic[W]):
    """Inputs for one call, the oldest first."""

    members: list[W]
    flush: Flush


class Buffers(Generic[W]):
    """The waiting inputs of one batched method; those of different keys are never mixed."""

    def __init__(self) -> None:
        #: In the order of their arrival; no key is without any.
        self._by_key: dict[Hashable, collections.deque[W]] = {}

    def put(self, waiting: W) -> None:
        self._by_key.setdefault(waiting.key, collections.deque()).append(waiting)

    def remove(self, waiting: W) -> bool:
        """Take out an input; whether it was there."""
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
        """Take out the batch that a free service runs now: of those that are due the oldest.

        Args:
            bounds: the limits of one call.
            now: seconds of the clock of ``Waiting.since``.
            is_draining: the replica takes nothing new: no input waits for others.
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
        """Seconds until a batch is due, if nothing comes or goes; ``None`` when nothing waits."""
        oldest = min((buffer[0].since for buffer in self._by_key.values()), default=None)
        return None if oldest is None else max(0.0, oldest + bounds.wait - now)


def _flush(
    buffer: collections.deque[W], bounds: Bounds, now: float, is_draining: bool
) -> Flush | None:
    """Why a batch of these inputs is due now; ``None`` when it is not."""
    if len(buffer) >= bounds.size:
        return Flush.FULL
    # What is counted here is fewer than a batch.
    if bounds.cost is not None and sum(waiting.cost for waiting in buffer) >= bounds.cost:
        return Flush.FULL
    if is_draining:
        return Flush.DRAIN
    # As `due_in` computes it: a timer must not find that it came a rounding error too early.
    if buffer[0].since + bounds.wait <= now or any(waiting.is_urgent for waiting in buffer):
        return Flush.DUE
    return None


def _take(buffer: collections.deque[W], bounds: Bounds) -> list[W]:
    """Take out the inputs of one call, the oldest first; one over the cost goes alone."""
    members: list[W] = []
    cost = 0
    while buffer and len(members) < bounds.size:
        cost += buffer[0].cost
        if members and bounds.cost is not None and cost > bounds.cost:
            break
        members.append(buffer.popleft())
    return members
