"""How long it takes until a replica is READY, from experience; pure."""

from __future__ import annotations

from collections.abc import Iterable

from gw_celery import snapshot

#: What the newest start-up counts in the mean.
_NEWEST = 0.5
_LOADING = frozenset({"starting", "entering", "probing", "benchmarking"})


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

    @property
    def is_loading(self) -> bool:
        """Whether a child is on its way: one that nobody has used yet is not idle."""
        return bool(self._began)

    def _learn(self, seconds: float) -> None:
        known = self.seconds
        seconds = max(0.0, seconds)
        self.seconds = seconds if known is None else known + _NEWEST * (seconds - known)
