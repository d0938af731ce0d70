"""What a worker publishes of its queues, in a Redis that is written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gw_celery.cluster import queue_lengths, redis, wait_estimates
from gw_celery.policy import queue_time
from gw_celery.pool import request
from gw_celery.protocol import snapshot
from gw_celery.protocol.snapshot import Counters, Worker


class Redis:
    """What a pipeline of the few commands needs."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[str, str]] = {}
        self.values: dict[str, str] = {}
        self.lifetimes: dict[str, int] = {}
        self.is_away = self.is_closed = False
        self._answers: list[Any] = []

    def pipeline(self, *, transaction: bool) -> Redis:
        assert not transaction
        self._answers = []
        return self

    def hset(self, key: str, field: str, value: str) -> None:
        self.hashes.setdefault(key, {})[field] = value
        self._answers.append(1)

    def hdel(self, key: str, *fields: str) -> None:
        for field in fields:
            self.hashes.get(key, {}).pop(field, None)

    def pexpire(self, key: str, lifetime: int) -> None:
        self._answers.append(1)

    def hgetall(self, key: str) -> None:
        self._answers.append(dict(self.hashes[key]))

    def set(self, key: str, value: str, px: int) -> None:
        self.values[key], self.lifetimes[key] = value, px

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def execute(self) -> list[Any]:
        if self.is_away:
            raise ConnectionError("away")
        return self._answers

    def close(self) -> None:
        self.is_closed = True


class Broker:
    """The lengths of queues, and whether anything reads them still."""

    def __init__(self) -> None:
        self.found: dict[str, queue_lengths.Length] | None = {"q": queue_lengths.Length(0)}
        self.is_closed = False

    def read(self) -> dict[str, queue_lengths.Length] | None:
        return self.found

    def close(self) -> None:
        self.is_closed = True


class Pool:
    """Two slots of one service, and what it says of them."""

    def __init__(self) -> None:
        self.tally = Counters()
        self.slots = 2
        self.score: float | None = None

    def snapshot(self) -> Worker:
        return Worker(
            hostname="w1",
            tallies={"embed": self.tally},
            ready_slots={"embed": self.slots},
            scores={"embed": snapshot.Score(value=self.score)},
        )


@pytest.fixture
def server() -> Redis:
    return Redis()


@pytest.fixture
def pool() -> Pool:
    return Pool()


def worker(
    server: Redis, pool: Pool, name: str = "w1", broker: Broker | None = None
) -> wait_estimates.Estimates:
    where = redis.Board(client=server)
    return wait_estimates.Estimates(where, broker or Broker(), name, {"q": {"embed": 2}}, pool)


def test_what_waits_in_the_queue_and_the_worker_is_done_at_the_pace_of_the_slots(
    server: Redis, pool: Pool
) -> None:
    broker = Broker()
    one = worker(server, pool, broker=broker)
    one.publish()
    assert server.values == {"gw:wait:q": "0.000"}, "nothing waits"
    broker.found = {"q": queue_lengths.Length(5)}
    one.publish()
    assert server.values == {}, "nobody knows how fast it is"
    pool.tally = Counters(waiting=4.0, served=10.0, busy=20.0, arrived_inputs=7, mean=2.0)
    one.publish()
    assert float(server.values["gw:wait:q"]) == (5 * 2.0 + 4.0) / (2 * 0.5)
    assert server.lifetimes["gw:wait:q"] == 5000


def test_a_score_goes_before_what_the_slots_have_done(server: Redis, pool: Pool) -> None:
    one = worker(server, pool)
    pool.tally, pool.score = Counters(waiting=30.0, served=1.0, busy=1.0), 10.0
    one.publish()
    assert float(server.values["gw:wait:q"]) == 3.0


def test_workers_share_a_queue_by_what_they_do_together(server: Redis, pool: Pool) -> None:
    pool.tally, pool.score = Counters(waiting=10.0), 10.0
    broker = Broker()
    broker.found = {"q": queue_lengths.Length(20)}
    first, second = (worker(server, pool, name, broker) for name in ("w1", "w2"))
    first.publish()
    assert float(server.values["gw:wait:q"]) == 3.0
    second.publish()
    assert float(server.values["gw:wait:q"]) == 2.0
    second._leave()
    first.publish()
    assert float(server.values["gw:wait:q"]) == 3.0


def test_a_quick_service_on_the_same_queue_makes_the_slow_one_no_quicker(server: Redis) -> None:
    class Two(Pool):
        def snapshot(self) -> Worker:
            return Worker(
                hostname="w1",
                tallies={"slow": Counters(arrived=98.0), "quick": Counters(arrived=2.0)},
                ready_slots={"slow": 1, "quick": 1},
                scores={"slow": snapshot.Score(value=2.0), "quick": snapshot.Score(value=900.0)},
            )

    broker = Broker()
    broker.found = {"q": queue_lengths.Length(100)}
    slots = {"q": {"slow": 1, "quick": 1}}
    wait_estimates.Estimates(redis.Board(client=server), broker, "w1", slots, Two()).publish()
    assert float(server.values["gw:wait:q"]) == pytest.approx(49.0)


def test_where_the_broker_does_not_tell_what_workers_hold_counts(server: Redis, pool: Pool) -> None:
    broker = Broker()
    broker.found = None
    pool.tally, pool.score = Counters(waiting=10.0), 10.0
    worker(server, pool, broker=broker).publish()
    assert float(server.values["gw:wait:q"]) == 1.0


def test_a_worker_that_serves_nothing_now_refuses_nobody(server: Redis, pool: Pool) -> None:
    pool.tally, pool.score, pool.slots = Counters(waiting=10.0), 10.0, 0
    worker(server, pool).publish()
    assert server.values == {}


def test_a_thousand_workers_take_longer_turns(server: Redis, pool: Pool) -> None:
    load = queue_time.write(queue_time.Load(rate=1.0), 1)
    server.hashes["gw:load:q"] = {f"w{number}": load for number in range(1000)}
    one = worker(server, pool)
    one.publish()
    one.publish()
    assert server.lifetimes["gw:wait:q"] == 50_000


def test_a_redis_that_is_away_is_told_of_once_and_the_thread_ends(
    server: Redis, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    server.is_away = True
    broker = Broker()
    one = worker(server, pool, broker=broker)
    for _ in range(3):
        one._try(one.publish)
    assert len(caplog.records) == 1
    one.start()
    started = request.now()
    one.close()
    assert (server.is_closed, broker.is_closed) == (True, True)
    assert request.now() - started < 2 * wait_estimates._PATIENCE + 5
