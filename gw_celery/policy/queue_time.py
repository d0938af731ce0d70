"""How long an input would wait: from how much is ahead of it, and how fast that is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import QueueLoad

#: How much of what is known of a service's speed a second leaves: the last minute counts most.
_KEPT = 0.98


def estimate(queued: float, loads: Collection[QueueLoad]) -> float | None:
    """Return the seconds that an input waits which comes now; ``None`` where that is not known.

    What runs counts on neither side: on average it is half done as the input comes, and what runs
    beside the input is half done as that starts.

    Args:
        queued: workload in the queue of the broker.
        loads: of all workers that serve it; a rate that is not known adds nothing.
    """
    ahead = queued + sum(load.waiting for load in loads)
    if ahead <= 0:
        return 0.0
    rate = sum(load.rate or 0.0 for load in loads)
    return ahead / rate if rate else None


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


class Recent:
    """What came for one service and what it did lately, in workload."""

    def __init__(self) -> None:
        self.came = 0.0
        self._served = self._busy = 0.0
        self._last = snapshot.Counters()

    @property
    def pace(self) -> float | None:
        """What one slot does in a second while it is taken.

        Not the throughput: a service that has little to do is not slow.
        """
        return self._served / self._busy if self._busy > 0 else None

    def observe(self, counters: snapshot.Counters) -> None:
        """Take in the sums since the worker started, once a second."""
        last, self._last = self._last, counters
        self.came = self.came * _KEPT + counters.arrived - last.arrived
        if counters.busy > last.busy:
            self._served = self._served * _KEPT + counters.served - last.served
            self._busy = self._busy * _KEPT + counters.busy - last.busy


class Loads:
    """What one worker tells of queues, from its counters.

    Args:
        queues: of each queue its services, and the slots that a replica has for each.
    """

    def __init__(self, queues: Mapping[str, Mapping[str, int]]) -> None:
        self._queues = queues
        self._recent = {service: Recent() for slots in queues.values() for service in slots}

    def observe(self, worker: snapshot.Worker) -> dict[str, QueueLoad]:
        """Return the load of each queue; called once a second."""
        return {queue: self._load(slots, worker) for queue, slots in self._queues.items()}

    def _load(self, slots: Mapping[str, int], worker: snapshot.Worker) -> QueueLoad:
        tallies = {key: worker.tallies[key] for key in slots if key in worker.tallies}
        for key, counters in tallies.items():
            self._recent[key].observe(counters)
        return QueueLoad(
            waiting=sum(counters.waiting for counters in tallies.values()),
            rate=shared(
                {service: self._rate(service, slots[service], worker) for service in slots},
                {service: self._recent[service].came for service in slots},
            ),
            mean=snapshot.mean_workload(tallies.values()),
        )

    def _rate(self, service: str, slots: int, worker: snapshot.Worker) -> float | None:
        """What the READY replicas do in a second: by their score, else by what slots have done."""
        score = worker.scores.get(service, snapshot.Score()).value
        pace = self._recent[service].pace if score is None else score / slots
        return None if pace is None else pace * worker.ready_slots.get(service, 0)
