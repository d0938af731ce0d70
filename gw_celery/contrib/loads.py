"""The services of a worker: what its picture says of each in several places, together; pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from gw_celery.protocol import snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a service here, what it has done, and what it could do.

    Workload is in the unit of the service's ``workload_calculator``; without one, an input is 1.
    ``None`` is what is not known.
    """

    #: The service's key; ``""`` for plain tasks.
    service: str
    #: Messages in its queues, those for other workers among them.
    queued: int | None = None
    #: This worker's part of the workload that waits, in the queues and in workers.
    backlog: float | None = None
    #: This worker's part of the replicas that the service needs.
    wanted: float | None = None
    #: Workload and inputs that arrived, were served, wait here without a slot, and run.
    counters: snapshot.Counters = dataclasses.field(default_factory=snapshot.Counters)
    #: Workload a second of one replica.
    score: float | None = None
    #: By what share the traffic says more than the benchmark, or less.
    drift: float | None = None
    ready_replicas: int = 0
    ready_slots: int = 0

    @property
    def capacity(self) -> float | None:
        """Workload a second of the replicas that are READY for it."""
        return None if self.score is None else self.score * self.ready_replicas


def of(seen: snapshot.Worker) -> tuple[Load, ...]:
    """Return the services of a worker, plain tasks first."""
    outlooks = {} if seen.scaling is None else seen.scaling.services
    known = {*seen.ready_slots, *seen.tallies, *seen.scores, *outlooks}
    return tuple(_load(seen, service) for service in sorted(known))


def _load(seen: snapshot.Worker, service: str) -> Load:
    score = seen.scores.get(service)
    ready = [replica for replica in seen.replicas if replica.state == "ready"]
    return Load(
        service=service,
        **_demand(seen.scaling, service),
        counters=seen.tallies.get(service, snapshot.Counters()),
        score=None if score is None else score.value,
        drift=None if score is None else score.drift,
        ready_replicas=sum(service not in replica.unready for replica in ready),
        ready_slots=seen.ready_slots.get(service, 0),
    )


def _demand(scaling: snapshot.Scaling | None, service: str) -> dict[str, Any]:
    """Divide what workers of a kind see alike: their sum is the truth, however many look."""
    outlook = None if scaling is None else scaling.services.get(service)
    if scaling is None or outlook is None:
        return {}
    return {
        "queued": outlook.queued,
        "backlog": outlook.waiting / scaling.workers,
        "wanted": max(outlook.need, outlook.keep) / scaling.workers,
    }
