"""An autoscaler on a pool without processes, with a broker that says what the test says."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from celery import Celery

from gw_celery import signals
from gw_celery.autoscale import autoscaler
from gw_celery.cluster import membership, queue_lengths
from gw_celery.pool import taskpool
from gw_celery.protocol import snapshot
from gw_celery.protocol.snapshot import Worker
from gw_celery.protocol.worker_record import ServiceRecord, Size, WorkerRecord

SLOTS = {"model": 4, "": 1}
QUEUES = {"model": ["cpu.model"], "": []}


class Pool(taskpool.TaskPool):
    """Only its size, and what it says of its work."""

    def __init__(self, app: Celery, name: str, limit: int = 5) -> None:
        self.options = {"initargs": (app, name)}
        self.cluster = membership.Membership(app, name, QUEUES, {}, 15.0)
        self.limit, self._slots_per_replica = limit, sum(SLOTS.values())
        self.supervisor: Any = self
        self.held: dict[str, snapshot.Counters] = {}
        self.known_scores: dict[str, float | None] = {"model": 10.0}
        self.failed = 0
        self.maintained = 0
        #: What it heard of its queues, each time.
        self.noted: list[dict[str, int]] = []
        #: Those that a test has it show instead of its own.
        self.shown: tuple[snapshot.Replica, ...] | None = None
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1

    @property
    def desired(self) -> int:
        return -(-self.limit // 5)

    def grow(self, n: int = 1) -> None:
        self.limit += n

    def shrink(self, n: int = 1) -> None:
        self.limit = max(0, self.limit - n)

    def maintain_pool(self, *args: Any, **kwargs: Any) -> None:
        self.maintained += 1

    def replicas(self) -> tuple[snapshot.Replica, ...]:
        if self.shown is not None:
            return self.shown
        return tuple(
            snapshot.Replica(
                number=number,
                state="failed" if number < self.failed else "ready",
                restarts=int(number < self.failed),
            )
            for number in range(self.desired)
        )

    def snapshot(self) -> Worker:
        return Worker(
            hostname=self.hostname,
            replicas=self.replicas(),
            desired=self.desired,
            desired_slots=self.limit,
            ready_slots={key: slots * self.desired for key, slots in SLOTS.items()},
            tallies=self.held,
            scores={key: snapshot.Score(value=value) for key, value in self.known_scores.items()},
        )

    def note_queued(self, queued: Mapping[str, int]) -> None:
        self.noted.append(dict(queued))


class Scaled:
    """The autoscaler of a worker, its pool, and a clock that steps a second.

    Args:
        name: the worker's node name.
        most: replicas that it may have, and ``least`` those that it keeps.
        target: inputs of the model that a replica is meant to hold.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        name: str = "gpu@me",
        most: int = 4,
        least: int = 1,
        target: int = 4,
        **settings: Any,
    ) -> None:
        self.app = Celery("scaled", broker="memory://", set_as_current=False)
        self.app.conf.update(settings)
        self.pool = Pool(self.app, name)
        served = [types.SimpleNamespace(key="model", target_inputs=target)]
        plan = types.SimpleNamespace(
            slots=SLOTS, served=served, queues=["cpu.model"], service_queues={"cpu.model": "model"}
        )
        monkeypatch.setattr(signals, "_plan", plan)
        worker = types.SimpleNamespace(app=self.app, hostname=name)
        self.scaler = autoscaler.Autoscaler(self.pool, 5 * most, 5 * least, worker=worker)
        self.now = 1000.0
        #: Messages that wait; ``None`` while nothing is known of the broker.
        self.queued: int | None = 0
        #: Whether the broker tells how many messages wait in it.
        self.tells = True
        self.on_read: Callable[[], None] = lambda: None
        self.peers: tuple[WorkerRecord, ...] | None = None
        self.clock = lambda: self.now
        monkeypatch.setattr(self.pool.cluster, "latest", self.latest)
        monkeypatch.setattr(self.pool.cluster, "follow", self._follow)
        monkeypatch.setattr(autoscaler, "time", types.SimpleNamespace(monotonic=self._time))
        self.scaler.begin()

    def _time(self) -> float:
        return self.clock()

    def _follow(self, on_read: Callable[[], None]) -> None:
        self.on_read = on_read

    def holds(self, **counters: float) -> None:
        """Have the worker hold, and have seen, so many inputs of the model."""
        self.pool.held = {"model": snapshot.Counters(**counters)}

    def shows(self, *states: str, **of_the_first: Any) -> None:
        """Have the pool show replicas in these states.

        Args:
            of_the_first: what else is shown of the first one.
        """
        shown = [snapshot.Replica(number=n, state=state) for n, state in enumerate(states)]
        if shown:
            shown[0] = dataclasses.replace(shown[0], **of_the_first)
        self.pool.shown = tuple(shown)

    def shows_its_own(self) -> None:
        self.pool.shown = None

    @property
    def seen(self) -> dict[str, Any]:
        """What ``inspect stats`` shows of the last decision."""
        decision: dict[str, Any] = self.scaler.info()["gw"]
        return decision

    def latest(self) -> membership.Reading | None:
        if self.queued is None:
            return None
        lengths = {"cpu.model": queue_lengths.Length(self.queued)} if self.tells else None
        return membership.Reading(at=self.now, lengths=lengths, others=self.peers)

    @property
    def record(self) -> WorkerRecord:
        """What the other workers are told."""
        return self.pool.cluster._record

    @property
    def told(self) -> Size:
        """What they are told of its size."""
        assert self.record.size is not None
        return self.record.size

    def after(self, seconds: int = 1) -> int:
        for _ in range(seconds):
            self.now += 1.0
            self.scaler.maybe_scale()
        return self.pool.desired


def other(
    name: str, *, score: float | None = 10.0, capacity: int = 4, least: int = 0, replicas: int = 0
) -> WorkerRecord:
    """Another worker of the same services."""
    size = Size(capacity=capacity, least=least, replicas=replicas)
    services = {
        key: ServiceRecord(queues=",".join(names), score=score) for key, names in QUEUES.items()
    }
    return WorkerRecord(worker=name, incarnation=name, size=size, services=services)
