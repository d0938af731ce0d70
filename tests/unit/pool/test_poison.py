from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.cluster import membership, poison_counts
from gw_celery.pool import requests
from gw_celery.transport import find


@dataclasses.dataclass(frozen=True)
class Request:
    task_id: str
    runs_alone: bool = False


def counter(most: int) -> requests.PoisonCounter:
    return requests.PoisonCounter(most)


def test_whatever_was_in_flight_at_a_death_is_suspect() -> None:
    seen = counter(most=3)
    seen.record([Request("a"), Request("b")])
    assert "a" in seen.suspects
    assert "b" in seen.suspects
    assert "c" not in seen.suspects


def test_a_death_in_company_is_never_blamed_on_one() -> None:
    seen = counter(most=1)
    for _ in range(10):
        seen.record([Request("a"), Request("b")])
    assert not seen.is_poison("a")


def test_an_input_that_kills_alone_as_often_as_it_may_is_poison() -> None:
    seen = counter(most=3)
    seen.record([Request("a"), Request("b")])
    for _ in range(2):
        seen.record([Request("a", runs_alone=True)])
        assert not seen.is_poison("a")
    seen.record([Request("a", runs_alone=True)])
    assert seen.is_poison("a")
    assert not seen.is_poison("b")


def test_a_death_in_company_in_between_clears_no_suspect() -> None:
    seen = counter(most=2)
    seen.record([Request("a", runs_alone=True)])
    seen.record([Request("a")])
    seen.record([Request("a", runs_alone=True)])
    assert seen.is_poison("a")


def test_an_input_that_survives_alone_is_cleared() -> None:
    seen = counter(most=2)
    seen.record([Request("a", runs_alone=True)])
    seen.forget("a")
    assert "a" not in seen.suspects
    seen.record([Request("a", runs_alone=True)])
    assert not seen.is_poison("a")
    seen.forget("never seen")


def test_a_death_with_nothing_in_flight_makes_no_suspect() -> None:
    seen = counter(most=1)
    seen.record([])
    assert "a" not in seen.suspects


def test_inputs_that_never_come_back_are_forgotten_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "_MOST_SUSPECTS", 2)
    seen = counter(most=3)
    for one in "abac":
        seen.record([Request(one)])
    assert [one in seen.suspects for one in "abc"] == [True, False, True]


# -- counts that workers share --


class Worker:
    """A worker's counts, with Redis behind them."""

    def __init__(self, app: Celery) -> None:
        self.woken = threading.Semaphore(0)
        self.cluster = membership.Membership(app, "w@h", {}, {}, 15.0, self.woken.release)
        self.cluster.begin()
        self.seen = requests.PoisonCounter(3, self.cluster.counts)
        self.known: list[str] = []
        self.asked: list[str] = []

    def ask(self, task_id: str) -> bool:
        self.asked.append(task_id)
        return self.seen.ask(len(self.asked) - 1, task_id)

    def settle(self) -> None:
        """Wait as the pool does until Redis has answered one question."""
        assert self.woken.acquire(timeout=30)
        self.take_in()

    def take_in(self) -> None:
        self.known += [self.asked[number] for number in self.seen.answers()]

    def close(self) -> None:
        assert self.cluster.close()


Start = Callable[[], Worker]


@pytest.fixture
def start(server: redis.Redis) -> Iterator[Callable[[], Worker]]:
    with Celery("poison", set_as_current=False) as app, contextlib.ExitStack() as stack:

        def start_one() -> Worker:
            worker = Worker(app)
            stack.callback(worker.close)
            return worker

        yield start_one


def test_what_other_workers_saw_makes_a_redelivered_input_suspect_or_poison(
    start: Start, server: redis.Redis
) -> None:
    server.mset({"gw:deaths:suspect": 0, "gw:deaths:poison": 3, "gw:deaths:odd": "no number"})
    worker = start()
    for one in ("suspect", "poison", "innocent", "odd"):
        assert worker.ask(one)
        worker.settle()
    assert worker.known == ["suspect", "poison", "innocent", "odd"]
    assert [one in worker.seen.suspects for one in worker.known] == [True, True, False, False]
    assert [worker.seen.is_poison(one) for one in worker.known] == [False, True, False, False]


def test_deaths_in_several_workers_add_up_and_are_forgotten_after_a_day(
    start: Start, server: redis.Redis
) -> None:
    for _ in range(3):
        worker = start()
        worker.seen.record([Request("a", runs_alone=True), Request("b")])
        worker.close()
    assert server.mget("gw:deaths:a", "gw:deaths:b") == [b"3", b"0"]
    assert 86_000 < server.ttl("gw:deaths:a") <= 86_400
    worker = start()
    worker.ask("a")
    worker.settle()
    assert worker.seen.is_poison("a")
    worker.seen.forget("a")
    worker.close()
    assert not server.exists("gw:deaths:a"), "also what was ordered last"


def test_an_answer_arrives_soon_and_in_the_pools_own_thread_only(
    start: Start, server: redis.Redis
) -> None:
    server.set("gw:deaths:a", 1)
    worker = start()
    worker.ask("a")
    began = time.monotonic()
    assert worker.woken.acquire(timeout=30)
    assert time.monotonic() - began < 0.9, "or it waits for the next round"
    assert worker.known == []
    worker.take_in()
    worker.take_in()
    assert worker.known == ["a"]


def test_a_redis_that_is_away_makes_each_worker_count_for_itself(
    start: Start, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> Any:
        raise ConnectionError("away")

    server.set("gw:deaths:b", 3)
    worker = start()
    worker.ask("its first round is over")
    worker.settle()
    worker.known.clear()
    with monkeypatch.context() as patch:
        patch.setattr(find.SharedRedis, "client", refuse)
        worker.seen.record([Request("a", runs_alone=True)] * 3)
        assert worker.seen.is_poison("a")
        assert worker.ask("b")
        worker.settle()
        assert worker.known == ["b"]
        assert "b" not in worker.seen.suspects
    assert worker.ask("c")
    worker.settle()
    assert worker.known == ["b", "c"]


def test_an_answer_that_comes_late_takes_back_no_death_that_was_seen_here(start: Start) -> None:
    worker = start()
    worker.ask("a")
    assert worker.woken.acquire(timeout=30)
    worker.seen.record([Request("a", runs_alone=True)] * 3)
    worker.take_in()
    assert worker.seen.is_poison("a")


def test_with_more_questions_than_may_wait_the_next_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison_counts, "_MOST", 2)
    worker = start()
    monkeypatch.setattr(worker.cluster, "wake", lambda: None)
    assert [worker.ask(one) for one in "abc"] == [True, True, False]
    worker.settle()
    worker.settle()
    assert worker.known == ["a", "b"]


def test_a_worker_that_ends_has_no_more_questions(start: Start) -> None:
    worker = start()
    worker.cluster.close()
    assert not worker.ask("a")


def test_without_a_redis_no_count_is_asked_for() -> None:
    seen = counter(most=3)
    assert not seen.ask(1, "a")
    assert list(seen.answers()) == []
