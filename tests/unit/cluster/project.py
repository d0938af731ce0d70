"""Workers of one project over a real Redis, on a clock that a test moves."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.cluster import liveness, membership
from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import Size
from gw_celery.transport import find

QUEUES = {"model": ["gpu.A100.model"], "": ["celery"]}
CLOCK = "test:now"


class Project:
    """Its workers are driven by hand, once a second; all else is as in a worker.

    Args:
        client: of the Redis that all know.
        ttl: of each worker.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        app: Celery,
        client: redis.Redis,
        ttl: float | None = 15.0,
    ) -> None:
        self.app, self.client, self.ttl = app, client, ttl
        self.workers: dict[str, membership.Membership] = {}
        self.now, self.shift, self.is_away = 1000.0, 0.0, False
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(membership, "time", clock)
        monkeypatch.setattr(liveness, "now", lambda: self.now)
        beat = liveness.BEAT.replace("redis.call('TIME')", f"{{redis.call('GET', '{CLOCK}'), '0'}}")
        assert beat != liveness.BEAT
        monkeypatch.setattr(liveness, "BEAT", beat)
        connect = find.SharedRedis.client

        def reach(shared: find.SharedRedis) -> Any:
            if self.is_away:
                raise ConnectionError("away")
            return connect(shared)

        monkeypatch.setattr(find.SharedRedis, "client", reach)

    def add(
        self, name: str, limited: Mapping[str, Mapping[str, int]] | None = None, **told: Any
    ) -> membership.Membership:
        """A worker comes; ``told`` is its snapshot."""
        worker = membership.Membership(self.app, name, QUEUES, limited or {}, self.ttl)
        worker.observe(snapshot.Worker(hostname=name, **told))
        worker.tell(snapshot.Worker(hostname=name, **told), Size(capacity=4))
        worker.read_others()
        self.workers[name] = worker
        return worker

    def after(self, seconds: int = 1, frozen: Collection[str] = ()) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.client.set(CLOCK, 1e9 + self.now + self.shift)
            for name, worker in self.workers.items():
                if name not in frozen:
                    worker._try_round()

    def known(self, name: str) -> list[str]:
        """The others, as a worker knows them."""
        return sorted(other.worker for other in self.workers[name].others)

    def tombstones(self) -> set[str]:
        keys: Any = self.client.keys("gw:dead:*")
        return {key.decode().removeprefix("gw:dead:") for key in keys}

    def alive(self) -> set[str]:
        names: Any = self.client.zrange("gw:alive", 0, -1)
        return {name.decode() for name in names}

    def close(self) -> None:
        self.is_away = False
        for worker in self.workers.values():
            worker.leave()
