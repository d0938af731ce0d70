"""What a worker learns by looking on once a second: how fast work comes, how long starts take."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from gw_celery import snapshot

#: Seconds over which a rate is taken.
_SPAN = 5.0
#: What the newest start-up counts in the mean.
_NEWEST = 0.5
_LOADING = frozenset({"starting", "entering", "probing", "benchmarking"})


class Meter:
    """How fast a sum grows, over the last seconds."""

    def __init__(self, span: float = _SPAN) -> None:
        self._span = span
        self._seen: collections.deque[tuple[float, float]] = collections.deque()

    def rate(self, now: float, total: float) -> float:
        """Note the sum and return how much it grew a second; less than 0 where it fell."""
        seen = self._seen
        seen.append((now, total))
        while len(seen) > 2 and seen[1][0] <= now - self._span:
            seen.popleft()
        since, before = seen[0]
        return (total - before) / (now - since) if now > since else 0.0


class StartUp:
    """Seconds from the start of a child until it is READY, from experience."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._began: dict[int, float] = {}

    def see(self, replicas: Iterable[snapshot.Replica], now: float) -> None:
        """Look at the replicas; a child that was not seen loading teaches nothing."""
        began: dict[int, float] = {}
        for one in replicas:
            if one.pid is None:
                continue
            if one.state in _LOADING:
                began[one.pid] = self._began.get(one.pid, now - one.seconds_in_state)
            elif one.state == "ready" and one.pid in self._began:
                self._learn(now - one.seconds_in_state - self._began[one.pid])
        self._began = began

    def _learn(self, seconds: float) -> None:
        known = self.seconds
        seconds = max(0.0, seconds)
        self.seconds = seconds if known is None else known + _NEWEST * (seconds - known)
