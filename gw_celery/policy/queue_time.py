"""How long an input would wait: from how much is ahead of it, and how fast that is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping

#: How much of what is known of a service's speed a second leaves: the last minute counts most.
_KEPT = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What one worker has of a service, and does of it in a second; in workload."""

    waiting: float = 0.0
    #: ``None`` before it is known.
    rate: float | None = None


def estimate(queued: float, waiting: float, rate: float | None) -> float | None:
    """Return the seconds that an input waits which comes now; ``None`` where nobody can tell.

    What runs counts on neither side: on average it is half done as the input comes, and what runs
    beside the input is half done as that starts.

    Args:
        queued: workload in the queue of the broker.
        waiting: workload that workers have taken and that has no slot.
        rate: workload that all replicas do in a second.
    """
    ahead = queued + waiting
    if ahead <= 0:
        return 0.0
    return ahead / rate if rate else None


def together(loads: Iterable[Load]) -> Load:
    """Return the load of several workers as that of one; a rate that is not known adds nothing."""
    listed = list(loads)
    rates = [one.rate for one in listed if one.rate is not None]
    return Load(
        waiting=sum(one.waiting for one in listed),
        rate=sum(rates) if rates else None,
    )


def shared(rates: Mapping[str, float | None], parts: Mapping[str, float]) -> float | None:
    """Return the workload a second that services do of a queue that they share.

    Each has slots of its own, so that the one that takes longest for its part sets the pace: one
    that is quick, and seldom called, makes the others no quicker.

    Args:
        rates: workload that each does in a second; ``None`` while nobody knows.
        parts: of the workload that comes, each one's.
    """
    # One that is not ready now says nothing of the others.
    known = {key: rate for key, rate in rates.items() if rate}
    total = sum(parts.get(key, 0.0) for key in known)
    if total <= 0:
        return min(known.values(), default=None)
    return min(rate * total / parts[key] for key, rate in known.items() if parts.get(key))


class Part:
    """How much workload came for one service of late."""

    def __init__(self) -> None:
        self._came = self._last = 0.0

    def observe(self, arrived: float) -> float:
        """Take in the sum since the worker started, once a second; returns what counts now."""
        self._came = self._came * _KEPT + arrived - self._last
        self._last = arrived
        return self._came


class Pace:
    """How much workload one slot does in a second while it is taken.

    Not the throughput: a service that has little to do is not slow.
    """

    def __init__(self) -> None:
        self._served = self._busy = 0.0
        self._last = (0.0, 0.0)

    def observe(self, served: float, busy: float) -> float | None:
        """Take in the sums since the worker started, once a second; returns the pace."""
        before_served, before_busy = self._last
        self._last = (served, busy)
        if busy > before_busy:
            self._served = self._served * _KEPT + served - before_served
            self._busy = self._busy * _KEPT + busy - before_busy
        return self._served / self._busy if self._busy > 0 else None


def write(load: Load, turn: int) -> str:
    """Return what a worker tells the others; no two turns read the same."""
    return json.dumps([turn, load.waiting, load.rate])


def read(text: str) -> Load | None:
    """Return what another worker told; ``None`` for what it cannot have meant."""
    try:
        _, waiting, rate = json.loads(text)
        return Load(waiting=float(waiting), rate=None if rate is None else float(rate))
    except (TypeError, ValueError):
        return None


class Told:
    """What workers tell each other of one queue, until they fall silent.

    By the reader's own clock: those of the machines need not agree.

    Args:
        lifetime: seconds after which one that has told nothing new is not counted.
    """

    def __init__(self, lifetime: float) -> None:
        self.lifetime = lifetime
        self._heard: dict[str, tuple[str, float]] = {}

    def hear(self, told: Mapping[str, str], now: float) -> list[Load]:
        """Take in what stands there now; returns the loads of the workers that live."""
        before = self._heard
        self._heard = {
            worker: known
            if (known := before.get(worker)) is not None and known[0] == text
            else (text, now)
            for worker, text in told.items()
        }
        alive = (text for text, since in self._heard.values() if now - since <= self.lifetime)
        return [load for text in alive if (load := read(text)) is not None]

    def silent(self, now: float) -> list[str]:
        """The workers that are gone for good."""
        long_ago = now - 10 * self.lifetime
        return [worker for worker, (_, since) in self._heard.items() if since < long_ago]
