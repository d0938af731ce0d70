"""The load of each service of a worker, gathered from its snapshot; pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from gw_celery.protocol import snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The demand for a service in one worker, what it has served, and its capacity.

    Workload is in the unit of the service's ``workload_calculator``; without one, an input is 1.
    ``None`` stands for a figure that is not known.
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
    #: By what share the served score is over the one of the benchmark, or under.
    drift: float | None = None
    ready_replicas: int = 0
    ready_slots: int = 0

    @property
    def capacity(self) -> float | None:
        """Workload a second of the replicas that are READY for it."""
        return None if self.score is None else self.score * self.ready_replicas


def of(worker: snapshot.Worker) -> tuple[Load, ...]:
    """Return the loads of the services of a worker, plain tasks first."""
    outlooks = {} if worker.scaling is None else worker.scaling.services
    services = {*worker.ready_slots, *worker.tallies, *worker.scores, *outlooks}
    return tuple(_load(worker, service) for service in sorted(services))


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
    """Divide the figures that all workers of a group see alike, so that their sum is right."""
    outlook = None if scaling is None else scaling.services.get(service)
    if scaling is None or outlook is None:
        return {}
    return {
        "queued": outlook.queued,
        "backlog": outlook.waiting / scaling.workers,
        "wanted": max(outlook.need, outlook.keep) / scaling.workers,
    }
