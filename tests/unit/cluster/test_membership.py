"""Against a real Redis: the embedded server of the test run."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator

import pytest
import redis

from gw_celery import devserver
from gw_celery.cluster import membership, records

NAMES = {"model": "gpu.A100.model", "": "celery"}
KEY = "p:gw:scale:gpu.A100.model"


@pytest.fixture
def client(gw_broker: devserver.Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(gw_broker.socket)) as client:
        yield client


class Worker:
    """One that tells and asks as often as it likes."""

    def __init__(self, client: redis.Redis, name: str) -> None:
        self.peers = membership.Peers(client, "p:", NAMES, name)
        self.told = records.Facts(worker=name)

    def round(self) -> dict[str, list[str]]:
        self.peers._next = 0.0
        found = self.peers.exchange({"model": self.told, "": self.told})
        return {service: [one.worker for one in others] for service, others in found.items()}


def test_workers_know_the_others_of_each_service(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    assert one.round() == {"model": [], "": []}
    assert two.round() == {"model": ["gpu@one"], "": ["gpu@one"]}
    assert one.round() == {"model": ["gpu@two"], "": ["gpu@two"]}


def test_one_that_leaves_is_forgotten_at_once(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    two.round()
    one.round()
    two.peers.leave()
    assert one.round()["model"] == []


def shift(client: redis.Redis, worker: str, seconds: float) -> None:
    """Make the facts of a worker older, as if it had been killed."""
    (written,) = client.hmget(KEY, [worker])
    assert isinstance(written, bytes)
    told = json.loads(written)
    client.hset(KEY, worker, json.dumps(told | {"at": told["at"] - seconds}))


def test_a_clock_that_is_set_back_keeps_no_dead_worker_alive(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    two.round()
    shift(client, "gpu@two", -3600.0)
    assert one.round()["model"] == []
    two.round()
    assert one.round()["model"] == ["gpu@two"], "it lives, and has told again"


def test_one_that_was_killed_is_not_counted_and_later_removed(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    two.round()
    shift(client, "gpu@two", 9.0)
    assert one.round()["model"] == ["gpu@two"]
    shift(client, "gpu@two", 2.0)
    assert one.round()["model"] == []
    assert client.hexists(KEY, "gpu@two")
    shift(client, "gpu@two", 600.0)
    one.round()
    assert not client.hexists(KEY, "gpu@two")


def test_what_cannot_be_read_is_removed_and_harms_nobody(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    two.round()
    client.hset(KEY, "odd", "{not json")
    client.hset(KEY, "older", json.dumps({"at": 1.0, "worker": "older"}))
    assert one.round()["model"] == ["gpu@two"]
    assert set(client.hkeys(KEY)) == {b"gpu@one", b"gpu@two"}


def test_the_hash_goes_when_nobody_writes_any_more(client: redis.Redis) -> None:
    Worker(client, "gpu@one").round()
    assert 0 < client.ttl(KEY) <= 600


def test_between_rounds_redis_is_left_alone(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    one.round()
    two.round()
    assert one.peers.exchange({}) == {"model": (), "": ()}


def test_the_more_workers_there_are_the_seldomer_each_asks(client: redis.Redis) -> None:
    one = Worker(client, "gpu@one")
    at = client.time()[0]
    for number in range(499):
        client.hset(KEY, f"gpu@{number}", records.Facts(worker=f"gpu@{number}").dumps(at))
    one.round()
    assert one.peers._next - time.monotonic() == pytest.approx(4.5, abs=0.4)


def test_facts_are_the_workers_own(client: redis.Redis) -> None:
    one, two = Worker(client, "gpu@one"), Worker(client, "gpu@two")
    two.told = dataclasses.replace(two.told, capacity=7, score=3.5)
    two.round()
    one.round()
    assert one.peers._known["model"] == (two.told,)
