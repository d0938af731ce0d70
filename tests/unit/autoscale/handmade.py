"""An autoscaler on a pool without processes, with a broker that says what the test says."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import pytest
from celery import Celery

from gw_celery import signals
from gw_celery.autoscale import autoscaler
from gw_celery.cluster import poller, queue_lengths, records
from gw_celery.pool import taskpool
from gw_celery.protocol import snapshot
from gw_celery.protocol.snapshot import Worker

SLOTS = {"model": 4, "": 1}


class Pool(taskpool.TaskPool):
    """Only its size, and what it says of its work."""

    def __init__(self, limit: int = 5) -> None:
        self.limit = limit
        self.held: dict[str, snapshot.Counters] = {}
        self.known_scores: dict[str, float | None] = {"model": 10.0}
        self.failed = 0
        self.maintained = 0
        self.noted: dict[str, int] = {}
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
            hostname="gpu@host",
            replicas=self.replicas(),
            desired=self.desired,
            desired_slots=self.limit,
            ready_slots={key: slots * self.desired for key, slots in SLOTS.items()},
            tallies=self.held,
            scores={key: snapshot.Score(value=value) for key, value in self.known_scores.items()},
        )

    def note_queued(self, queued: Mapping[str, int]) -> None:
        self.noted = dict(queued)


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
        self.pool = Pool()
        served = [types.SimpleNamespace(key="model", target_inputs=target)]
        plan = types.SimpleNamespace(
            slots=SLOTS, served=served, queues=["cpu.model"], service_queues={"cpu.model": "model"}
        )
        monkeypatch.setattr(signals, "_plan", plan)
        worker = types.SimpleNamespace(app=self.app, hostname=name)
        self.scaler = autoscaler.Autoscaler(self.pool, 5 * most, 5 * least, worker=worker)
        self.now = 1000.0
        self.queued: int | None = 0
        self.peers: tuple[records.Facts, ...] | None = None
        monkeypatch.setattr(self.scaler._demand, "latest", self.latest)
        monkeypatch.setattr(autoscaler, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def latest(self) -> poller.Reading | None:
        if self.queued is None:
            return None
        counted = {"model": queue_lengths.Length(self.queued)}
        others = None if self.peers is None else {"model": self.peers, "": self.peers}
        return poller.Reading(at=self.now, lengths=counted, peers=others)

    def after(self, seconds: int = 1) -> int:
        for _ in range(seconds):
            self.now += 1.0
            self.scaler.maybe_scale()
        return self.pool.desired


def other(name: str, **given: Any) -> records.Facts:
    told: dict[str, Any] = {"capacity": 4, "score": 10.0, "serves": ",model"}
    return records.Facts(worker=name, **(told | given))
