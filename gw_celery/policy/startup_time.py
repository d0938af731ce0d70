"""How long it takes until a replica is READY, from experience; pure."""

from __future__ import annotations

from collections.abc import Iterable

from gw_celery.protocol import snapshot

#: What the newest start-up counts in the mean.
_NEWEST = 0.5
_LOADING = frozenset({"starting", "entering", "probing", "benchmarking"})


class StartUp:
    """Seconds from the start of a child until it is READY, from experience."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        #: Whether a child is on its way: one that nobody has used yet is not idle.
        self.is_loading = False
        self._known: set[int] = set()

    def see(self, replicas: Iterable[snapshot.Replica]) -> None:
        """Look at the replicas; each child teaches once, when it has been READY."""
        loaded: dict[int, float] = {}
        self.is_loading = False
        for one in replicas:
            if one.pid is not None and one.start_up is not None:
                loaded[one.pid] = one.start_up
            elif one.state in _LOADING:
                self.is_loading = True
        for pid in loaded.keys() - self._known:
            self._learn(loaded[pid])
        self._known = set(loaded)

    def _learn(self, seconds: float) -> None:
        known = self.seconds
        self.seconds = seconds if known is None else known + _NEWEST * (seconds - known)
