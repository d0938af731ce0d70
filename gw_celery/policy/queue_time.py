"""Estimates the wait of an input from the work ahead of it; pure, in the worker's parent."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import QueueLoad

#: Factor per second for the weight of earlier seconds: the last minute counts most.
_KEPT = 0.98


def estimate(queued: float, loads: Collection[QueueLoad]) -> float | None:
    """Return the seconds that an input sent now would wait; ``None`` if unknown.

    Running inputs are ignored. On average they are half done at the arrival, and those that run
    beside the new input are half done at its start: both effects cancel.

    Args:
        queued: workload in the broker's queue.
        loads: loads of all workers that serve the queue; an unknown rate adds nothing.
    """
    ahead = queued + sum(load.waiting for load in loads)
    if ahead <= 0:
        return 0.0
    rate = sum(load.rate or 0.0 for load in loads)
    return ahead / rate if rate else None


def shared(rates: Mapping[str, float | None], parts: Mapping[str, float]) -> float | None:
    """Return the workload per second that several services do of a shared queue.

    Each service has its own slots. The one that takes longest for its part of the workload sets
    the pace; a fast service with few calls does not make the others faster.

    Args:
        rates: workload per second of each service; ``None`` if unknown.
        parts: arriving workload of each service.
    """
    # A service without READY replicas says nothing about the others.
    known = {key: rate for key, rate in rates.items() if rate}
    total = sum(parts.get(key, 0.0) for key in known)
    if total <= 0:
        return min(known.values(), default=None)
    return min(rate * total / parts[key] for key, rate in known.items() if parts.get(key))


class Recent:
    """Recent arrivals and work of one service, in workload."""

    def __init__(self) -> None:
        self.came = 0.0
        self._served = self._busy = 0.0
        self._last = snapshot.Counters()

    @property
    def pace(self) -> float | None:
        """The workload per second of one busy slot.

        This is not the throughput: a service with little work is not slow.
        """
        return self._served / self._busy if self._busy > 0 else None

    def observe(self, counters: snapshot.Counters) -> None:
        """Update by the counters; called once a second."""
        last, self._last = self._last, counters
        self.came = self.came * _KEPT + counters.arrived - last.arrived
        if counters.busy > last.busy:
            self._served = self._served * _KEPT + counters.served - last.served
            self._busy = self._busy * _KEPT + counters.busy - last.busy


class Loads:
    """The loads of queues in one worker, from its counters.

    Args:
        queues: the services of each queue, with the slots that a replica has for each.
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
        """Return the workload per second of READY replicas, by their score or their slots' pace."""
        score = worker.scores.get(service, snapshot.Score()).value
        pace = self._recent[service].pace if score is None else score / slots
        return None if pace is None else pace * worker.ready_slots.get(service, 0)
