"""How long an input would wait: from how much is ahead of it, and how fast that is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import QueueLoad

#: How much of what is known of a service's speed a second leaves: the last minute counts most.
_KEPT = 0.98


def estimate(queued: float, waiting: float, rate: float | None) -> float | None:
    """Return the seconds that an input waits which comes now; ``None`` where that is not known.

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


def together(loads: Iterable[QueueLoad]) -> QueueLoad:
    """Return the load of several workers as that of one; a rate that is not known adds nothing."""
    listed = list(loads)
    rates = [load.rate for load in listed if load.rate is not None]
    return QueueLoad(
        waiting=sum(load.waiting for load in listed),
        rate=sum(rates) if rates else None,
    )


def shared(rates: Mapping[str, float | None], parts: Mapping[str, float]) -> float | None:
    """Return the workload a second that services do of a queue that they share.

    Each has slots of its own, so that the one that takes longest for its part sets the pace: one
    that is quick, and seldom called, makes the others no quicker.

    Args:
        rates: workload that each does in a second; ``None`` while that is not known.
        parts: of the workload that comes, each one's.
    """
    # One that is not ready now says nothing of the others.
    known = {key: rate for key, rate in rates.items() if rate}
    total = sum(parts.get(key, 0.0) for key in known)
    if total <= 0:
        return min(known.values(), default=None)
    return min(rate * total / parts[key] for key, rate in known.items() if parts.get(key))


class Part:
    """Recent workload that came for one service."""

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


class Loads:
    """What one worker tells of queues, from its counters.

    Args:
        queues: of each queue its services, and the slots that a replica has for each.
    """

    def __init__(self, queues: Mapping[str, Mapping[str, int]]) -> None:
        self._queues = queues
        self._paces = {service: Pace() for slots in queues.values() for service in slots}
        self._parts = {service: Part() for slots in queues.values() for service in slots}

    def observe(self, worker: snapshot.Worker) -> dict[str, QueueLoad]:
        """Return the load of each queue; called once a second."""
        return {queue: self._load(slots, worker) for queue, slots in self._queues.items()}

    def _load(self, slots: Mapping[str, int], worker: snapshot.Worker) -> QueueLoad:
        tallies = {key: worker.tallies[key] for key in slots if key in worker.tallies}
        return QueueLoad(
            waiting=sum(counters.waiting for counters in tallies.values()),
            rate=shared(
                {service: self._rate(service, slots[service], worker) for service in slots},
                {key: self._parts[key].observe(sums.arrived) for key, sums in tallies.items()},
            ),
            mean=snapshot.mean_workload(tallies.values()),
        )

    def _rate(self, service: str, slots: int, worker: snapshot.Worker) -> float | None:
        """What the READY replicas do in a second: by their score, else by what slots have done."""
        counters = worker.tallies.get(service, snapshot.Counters())
        pace = self._paces[service].observe(counters.served, counters.busy)
        score = worker.scores.get(service, snapshot.Score()).value
        if score is not None:
            pace = score / slots
        return None if pace is None else pace * worker.ready_slots.get(service, 0)
