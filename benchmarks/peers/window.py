"""When a run is measured: once all calls in flight have turned twice, for a number of seconds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class Window:
    """Counts answers; ``read`` returns the counters of CPU seconds at both of its ends.

    Both ends are a multiple of ``step`` answers, that is at the same place of a batch: a rate of
    whole batches is not off by the half of one. A slow system waits at most as long again for it.

    It may not turn all of its calls within ``warm_up`` seconds, either. Then measuring begins all
    the same, and the latencies are those of calls that found a shorter queue: lower bounds.
    """

    in_flight: int
    step: int
    warm_up: float
    seconds: float
    read: Callable[[], dict[str, float]]
    answered: int = 0
    is_settled: bool = False
    is_over: bool = False

    _first: float | None = None
    _opened: float | None = None
    _closed: float = 0.0

    def __post_init__(self) -> None:
        self._latencies: list[float] = []
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}

    def done(self, sent: float, now: float) -> None:
        """Note one answer, to a call of the time ``sent``."""
        self.answered += 1
        if self._first is None:
            self._first = now
        if self._opened is not None:
            self._latencies.append(now - sent)
            if self._is_full(now - self._opened):
                self._close(now)
        elif self._is_warm(now - self._first):
            self._opened, self._before = now, self.read()

    def _is_warm(self, since: float) -> bool:
        # Twice: the first calls have waited for the start.
        self.is_settled = self.answered >= 2 * self.in_flight
        return since >= self.warm_up or (self.is_settled and since >= min(1.0, self.warm_up))

    def _is_full(self, since: float) -> bool:
        is_whole = len(self._latencies) % self.step == 0
        return since >= 2 * self.seconds or (is_whole and since >= self.seconds)

    def _close(self, now: float) -> None:
        self._after, self._closed = self.read(), now
        self.is_over = True

    def figures(self) -> dict[str, Any]:
        """Of a window that is over: rate, latencies, and CPU a call by counter."""
        count = len(self._latencies)
        cuts = statistics.quantiles(self._latencies, n=100) if count > 1 else self._latencies * 99
        return {
            "answered": count,
            "is_settled": self.is_settled,
            "rate": count / (self._closed - (self._opened or 0.0)),
            "p50": cuts[49],
            "p99": cuts[98],
            **{name: (self._after[name] - self._before[name]) / count for name in self._before},
        }
