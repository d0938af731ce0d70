"""How long a replica takes until it is READY, from experience; pure."""

from __future__ import annotations

from collections.abc import Iterable

from gw_celery.protocol import snapshot

#: Weight of the newest start-up in the mean.
_NEWEST = 0.5
_LOADING = frozenset({"starting", "entering", "probing", "benchmarking"})


class StartUp:
    """The mean duration of a start-up, from the start of a child until it is READY."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        #: A child is loading: a worker with a replica on its way is not idle.
        self.is_loading = False
        self._pids: set[int] = set()

    def observe(self, replicas: Iterable[snapshot.Replica]) -> None:
        """Learn from the replicas; each child counts once, when it has been READY."""
        start_ups: dict[int, float] = {}
        self.is_loading = False
        for replica in replicas:
            if replica.pid is not None and replica.start_up is not None:
                start_ups[replica.pid] = replica.start_up
            elif replica.state in _LOADING:
                self.is_loading = True
        for pid in start_ups.keys() - self._pids:
            mean, seconds = self.seconds, start_ups[pid]
            self.seconds = seconds if mean is None else mean + _NEWEST * (seconds - mean)
        self._pids = set(start_ups)
