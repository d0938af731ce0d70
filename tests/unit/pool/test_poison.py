from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from gw_celery.pool import poison


@dataclasses.dataclass(frozen=True)
class Job:
    task_id: str
    runs_alone: bool = False


class Reader:
    def wake(self) -> None:
        raise AssertionError("nothing was asked")


def counter(most: int) -> poison.PoisonCounter:
    return poison.PoisonCounter(most, Reader())


def test_whatever_was_in_flight_at_a_death_is_suspect() -> None:
    seen = counter(most=3)
    seen.record([Job("a"), Job("b")])
    assert seen.is_suspect("a")
    assert seen.is_suspect("b")
    assert not seen.is_suspect("c")


def test_a_death_in_company_is_never_blamed_on_one() -> None:
    seen = counter(most=1)
    for _ in range(10):
        seen.record([Job("a"), Job("b")])
    assert not seen.is_poison("a")


def test_an_input_that_kills_alone_as_often_as_it_may_is_poison() -> None:
    seen = counter(most=3)
    seen.record([Job("a"), Job("b")])
    for _ in range(2):
        seen.record([Job("a", runs_alone=True)])
        assert not seen.is_poison("a")
    seen.record([Job("a", runs_alone=True)])
    assert seen.is_poison("a")
    assert not seen.is_poison("b")


def test_a_death_in_company_in_between_clears_nobody() -> None:
    seen = counter(most=2)
    seen.record([Job("a", runs_alone=True)])
    seen.record([Job("a")])
    seen.record([Job("a", runs_alone=True)])
    assert seen.is_poison("a")


def test_an_input_that_survives_alone_is_cleared() -> None:
    seen = counter(most=2)
    seen.record([Job("a", runs_alone=True)])
    seen.forget("a")
    assert not seen.is_suspect("a")
    seen.record([Job("a", runs_alone=True)])
    assert not seen.is_poison("a")
    seen.forget("never seen")


def test_a_death_with_nothing_in_flight_suspects_nobody() -> None:
    seen = counter(most=1)
    seen.record([])
    assert not seen.is_suspect("a")


def test_inputs_that_never_come_back_are_forgotten_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(poison, "_MOST", 2)
    seen = counter(most=3)
    for one in "abac":
        seen.record([Job(one)])
    assert [seen.is_suspect(one) for one in "abc"] == [True, False, True]


# -- counts that workers share --


class Redis:
    """A client of a server with counts, which can be away."""

    def __init__(self, **counts: int) -> None:
        self.counts = {"gw:deaths:" + name: count for name, count in counts.items()}
        self.lifetimes: dict[str, int] = {}
        self.is_away = False

    def pipeline(self) -> Redis:
        return self

    def __enter__(self) -> Redis:
        return self

    def __exit__(self, *_: object) -> None: ...

    def execute(self) -> None: ...

    def incrby(self, key: str, by: int) -> None:
        if self.is_away:
            raise ConnectionError
        self.counts[key] = self.counts.get(key, 0) + by

    def expire(self, key: str, seconds: int) -> None:
        self.lifetimes[key] = seconds

    def delete(self, key: str) -> None:
        self.counts.pop(key, None)

    def get(self, key: str) -> bytes | None:
        if self.is_away:
            raise ConnectionError
        return str(self.counts[key]).encode() if key in self.counts else None


class Worker:
    """A worker's counts, with Redis behind them."""

    def __init__(self, redis: Redis) -> None:
        self.woken = threading.Semaphore(0)
        client: Any = redis
        self.seen = poison.PoisonCounter(3, self, lambda: client)
        self.known: list[str] = []
        self.asked: list[str] = []

    def wake(self) -> None:
        self.woken.release()

    def ask(self, task_id: str) -> bool:
        self.asked.append(task_id)
        return self.seen.ask(len(self.asked) - 1, task_id)

    def settle(self) -> None:
        """Wait as the pool does until Redis has answered one question."""
        assert self.woken.acquire(timeout=30)
        self.take_in()

    def take_in(self) -> None:
        self.known += [self.asked[number] for number in self.seen.answers()]


def test_what_other_workers_saw_makes_a_redelivered_input_suspect_or_poison() -> None:
    worker = Worker(Redis(suspect=0, poison=3))
    for one in ("suspect", "poison", "innocent"):
        assert worker.ask(one)
        worker.settle()
    assert worker.known == ["suspect", "poison", "innocent"]
    assert [worker.seen.is_suspect(one) for one in worker.known] == [True, True, False]
    assert [worker.seen.is_poison(one) for one in worker.known] == [False, True, False]
    worker.seen.close()


def test_deaths_in_several_workers_add_up_and_are_forgotten_after_a_day() -> None:
    redis = Redis()
    for _ in range(3):
        worker = Worker(redis)
        worker.seen.record([Job("a", runs_alone=True), Job("b")])
        worker.seen.close()
    assert redis.counts == {"gw:deaths:a": 3, "gw:deaths:b": 0}
    assert set(redis.lifetimes.values()) == {86_400}
    worker = Worker(redis)
    worker.ask("a")
    worker.settle()
    assert worker.seen.is_poison("a")
    worker.seen.forget("a")
    worker.seen.close()
    assert "gw:deaths:a" not in redis.counts


def test_an_answer_arrives_in_the_pools_own_thread_only() -> None:
    worker = Worker(Redis(a=1))
    worker.ask("a")
    assert worker.woken.acquire(timeout=30)
    assert worker.known == []
    worker.take_in()
    worker.take_in()
    assert worker.known == ["a"]
    worker.seen.close()


def test_a_redis_that_is_away_makes_each_worker_count_for_itself() -> None:
    redis = Redis()
    redis.is_away = True
    worker = Worker(redis)
    worker.seen.record([Job("a", runs_alone=True)] * 3)
    assert worker.seen.is_poison("a")
    assert worker.ask("b")
    worker.settle()
    assert worker.known == ["b"]
    assert not worker.seen.is_suspect("b")
    redis.is_away = False
    assert worker.ask("c")
    worker.settle()
    assert worker.known == ["b", "c"]
    worker.seen.close()


def test_an_answer_that_comes_late_takes_back_no_death_that_was_seen_here() -> None:
    worker = Worker(Redis(a=0))
    worker.ask("a")
    assert worker.woken.acquire(timeout=30)
    worker.seen.record([Job("a", runs_alone=True)] * 3)
    worker.take_in()
    assert worker.seen.is_poison("a")
    worker.seen.close()


def test_without_a_redis_there_is_nobody_to_ask() -> None:
    seen = counter(most=3)
    assert not seen.ask(1, "a")
    assert list(seen.answers()) == []
    seen.close()
