"""Inputs that come again: those that kill children, and second deliveries."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gw_celery import background_thread, errors
from gw_celery.cluster import membership, poison_counts
from gw_celery.protocol import headers
from tests.pool_harness import Harness, Request
from tests.processes import eventually
from tests.unit.pool.test_requests import begun, counts, refilled

StartPool = Callable[..., Harness]


class SlowRedis:
    """A client of a server with counts, which answers once it is let."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.is_let = threading.Event()
        self.asked: list[str] = []

    def get(self, key: str) -> bytes | None:
        self.asked.append(key)
        assert self.is_let.wait(30)
        return str(self.counts[key]).encode() if key in self.counts else None

    def incrby(self, key: str, by: int) -> None:
        self.counts[key] = self.counts.get(key, 0) + by

    def expire(self, key: str, seconds: int) -> None: ...

    def delete(self, key: str) -> None:
        self.counts.pop(key, None)


class Pipe:
    """A pipeline of such a client that asks at once."""

    def __init__(self, redis: SlowRedis) -> None:
        self._redis = redis
        self.answers: list[Any] = []

    def mget(self, *keys: str) -> None:
        self.answers.append([self._redis.get(key) for key in keys])

    def delete(self, *keys: str) -> None:
        self.answers.append([self._redis.delete(key) for key in keys])

    def eval(self, script: str, keys: int, key: str, deaths: int, seconds: int) -> None:
        self._redis.incrby(key, deaths)
        self.answers.append(self._redis.expire(key, seconds))


class Counting(background_thread.BackgroundThread):
    """Answers the pool from such a client, as the thread of the cluster does."""

    def __init__(self, redis: SlowRedis, wake: Callable[[], None]) -> None:
        super().__init__("gw-test-counts", "nothing is counted", period=math.inf)
        self._redis = redis
        self.counts = poison_counts.Shared(self, wake)

    def run_round(self) -> None:
        pipe = Pipe(self._redis)
        self.counts.ask_redis(pipe, "gw:deaths:")
        self.counts.answer(iter(pipe.answers))


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowRedis]:
    """The Redis of the pools that are started from now on."""
    redis, threads = SlowRedis(), list[Counting]()

    class WithCounts(membership.Membership):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            threads.append(Counting(redis, args[-1]))
            threads[-1].start()
            self.counts = threads[-1].counts

    monkeypatch.setattr(membership, "Membership", WithCounts)
    yield redis
    redis.is_let.set()
    for thread in threads:
        assert thread.close()


def poison(redis: SlowRedis, task_id: str, deaths: int) -> None:
    redis.counts[f"gw:deaths:{task_id}"] = deaths


def after_its_answer(harness: Harness, redis: SlowRedis, is_done: Callable[[], Any]) -> None:
    redis.is_let.set()
    eventually(lambda: harness.poll() or is_done())


# -- inputs that kill --


def test_what_ran_beside_one_that_kills_is_answered(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=1)
    together = [begun(harness, task_id="killer"), begun(harness, task_id="innocent")]
    harness.child(0).die()
    assert [request.heard[-1] for request in together] == ["WorkerLostError"] * 2
    refilled(harness)
    killer = harness.submit(task_id="killer", is_redelivered=True)
    innocent = harness.submit(task_id="innocent", is_redelivered=True)
    child = harness.child(0)
    child.accept(killer)
    child.die()
    refilled(harness)
    child = harness.child(0)
    assert child.runs == ["innocent"]
    child.accept(innocent)
    child.done(innocent)
    assert (killer.heard[-1], innocent.heard[-1]) == ("PoisonedInput", "done")


def test_an_input_that_other_workers_know_to_kill_never_starts(
    start_pool: StartPool, redis: SlowRedis
) -> None:
    poison(redis, "killer", 3)
    harness = start_pool(max_deaths=3)
    killer = harness.submit(task_id="killer", is_redelivered=True)
    assert harness.child(0).runs == []
    after_its_answer(harness, redis, lambda: killer.heard)
    assert killer.heard == ["PoisonedInput"]
    assert harness.child(0).runs == []
    eventually(lambda: redis.counts == {}, 10)  # sent again by its user, it begins anew
    assert counts(harness) == (1, 0, 0, 0, 1)


def test_an_input_that_other_workers_suspect_runs_alone(
    start_pool: StartPool, redis: SlowRedis
) -> None:
    poison(redis, "suspect", 1)
    harness = start_pool(max_deaths=3)
    suspect = harness.submit(task_id="suspect", is_redelivered=True)
    child = harness.child(0)
    after_its_answer(harness, redis, lambda: child.runs)
    other = harness.submit()
    assert (child.runs, child.alone) == (["suspect"], ["suspect"])
    child.done(suspect)
    child.done(other)


def test_only_what_was_delivered_before_is_asked_about(
    start_pool: StartPool, redis: SlowRedis
) -> None:
    poison(redis, "a", 3)
    harness = start_pool()
    request = harness.submit(task_id="a")
    assert (harness.child(0).runs, redis.asked) == (["a"], [])
    harness.child(0).done(request)


def test_a_redis_that_does_not_answer_holds_an_input_for_two_seconds(
    start_pool: StartPool, redis: SlowRedis
) -> None:
    poison(redis, "a", 3)
    harness = start_pool()
    request = harness.submit(task_id="a", is_redelivered=True)
    child = harness.child(0)
    harness.advance(1.0)
    assert child.runs == []
    harness.advance(2.0)
    assert child.runs == ["a"]
    child.done(request)
    redis.is_let.set()
    eventually(lambda: redis.asked)
    for _ in range(3):
        harness.advance(1.0)
    assert child.runs == ["a"], "the late answer starts nothing a second time"
    assert request.heard == ["done"]


@pytest.mark.parametrize("how", ["terminated", "forgotten"])
def test_what_is_asked_about_and_stopped_or_forgotten_never_runs(
    start_pool: StartPool, redis: SlowRedis, how: str
) -> None:
    harness = start_pool()
    request = harness.submit(task_id="a", is_redelivered=True)
    if how == "terminated":
        harness.revoke(request, terminate=True)
    else:
        harness.pool.flush()
    redis.is_let.set()
    harness.advance(5.0)
    assert harness.child(0).runs == []
    assert request.heard == (["accepted", "Terminated"] if how == "terminated" else [])
    assert counts(harness) == (1, 0, 0, 0, 1)


def test_a_shutdown_blames_no_input(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=1, shutdown_timeout=1.0, cancel_timeout=1.0)
    begun(harness, task_id="suspect")
    harness.child(0).die()
    refilled(harness)
    suspect = begun(harness, task_id="suspect", is_redelivered=True)
    assert harness.child(0).alone == ["suspect"]
    harness.stop()
    assert suspect.heard == ["accepted", "given back"]


# -- what is kept of those that are given up --


class Kept:
    """Stands for the dead letters: the ids that it was given, with their deaths."""

    def __init__(self, harness: Harness) -> None:
        self.letters: list[tuple[str, int]] = []
        harness.pool.supervisor.requests._dead_letters = self

    def keep(self, given_up: Any, reason: str, deaths: int) -> None:
        assert "is not tried again (setting gw_max_deaths)" in reason
        self.letters.append((given_up.task_id, deaths))


def killed(harness: Harness, **options: Any) -> Request:
    """An input that its child dies of; the next child is READY."""
    request = begun(harness, task_id="killer", **options)
    harness.child(0).die()
    refilled(harness)
    return request


def test_an_input_that_is_given_up_is_kept_once_with_its_deaths(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=2)
    kept = Kept(harness)
    killed(harness)
    killed(harness, is_redelivered=True)
    assert kept.letters == []
    last = killed(harness, is_redelivered=True)
    assert kept.letters == [("killer", 2)]
    assert last.heard[-1] == "PoisonedInput"


def test_an_input_that_other_workers_saw_kill_is_kept_where_it_arrives(
    start_pool: StartPool, redis: SlowRedis
) -> None:
    poison(redis, "killer", 3)
    harness = start_pool()
    kept = Kept(harness)
    harness.submit(task_id="killer", is_redelivered=True)
    after_its_answer(harness, redis, lambda: kept.letters)
    assert kept.letters == [("killer", 3)]


def poisoned_in_an_outage(harness: Harness) -> Request:
    killed(harness)
    request = begun(harness, task_id="killer", is_redelivered=True)
    request.on_heard = lambda what: _raise(errors.ResultsUnavailable("away"))
    harness.child(0).die()
    return request


def _raise(exc: Exception) -> None:
    raise exc


def test_a_dead_letter_waits_with_the_answer(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=1)
    kept = Kept(harness)
    request = poisoned_in_an_outage(harness)
    harness.advance(3.0)
    assert (set(request.heard), kept.letters) == ({"accepted", "PoisonedInput"}, [])
    request.on_heard = lambda what: None
    harness.advance(3.0)
    assert kept.letters == [("killer", 1)]
    refilled(harness)


def test_an_input_that_is_given_back_instead_is_kept_where_it_arrives(
    start_pool: StartPool,
) -> None:
    harness = start_pool(max_deaths=1, store_timeout=5.0)
    kept = Kept(harness)
    request = poisoned_in_an_outage(harness)
    harness.advance(7.0)
    assert (request.heard[-1], kept.letters) == ("given back", [])
    refilled(harness)
    harness.submit(task_id="killer", is_redelivered=True)
    harness.advance(4.0)
    assert kept.letters == [("killer", 1)]


def test_a_worker_that_was_declared_lost_keeps_no_dead_letter(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=1)
    kept = Kept(harness)
    request = poisoned_in_an_outage(harness)
    request.on_heard = lambda what: _raise(errors.DeclaredLost("killer", "w.0/1"))
    harness.advance(3.0)
    assert (request.heard[-1], kept.letters) == ("given back", [])
    refilled(harness)


def test_what_a_person_sent_again_has_no_deaths_here_until_it_is_redelivered(
    start_pool: StartPool,
) -> None:
    harness = start_pool(max_deaths=2)
    kept, again = Kept(harness), {headers.REQUEUED: True}
    killed(harness)
    killed(harness, is_redelivered=True)  # alone, once
    killed(harness, headers=again)
    assert harness.children[-2].alone == [], "it begins anew"
    killed(harness, headers=again, is_redelivered=True)
    assert kept.letters == []
    killed(harness, headers=again, is_redelivered=True)
    assert kept.letters == [("killer", 2)]


# -- twins: the same message, delivered again while it runs --


def test_a_second_delivery_is_answered_with_the_one_that_waits_for_a_slot(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1})
    running = harness.submit()
    request = harness.submit(task_id="same")
    twin = harness.submit(task_id="same", is_redelivered=True)
    child = harness.child(0)
    child.done(running)
    child.accept(request)
    child.done(request)
    assert child.runs == [running.id, "same"]
    assert request.heard == twin.heard == ["accepted", "done"]


def test_a_delivery_after_the_answer_runs(harness: Harness) -> None:
    request = begun(harness, task_id="same")
    harness.revoke(request, terminate=True)
    again = harness.submit(task_id="same", is_redelivered=True, retries=0)
    child = harness.child(0)
    assert child.runs == ["same"], "it is revoked"
    assert again.heard == ["revoked"], "what was stopped answers no other"
    child.gone(request)


def test_a_twin_starts_elsewhere_with_its_input_and_is_answered_with_it(harness: Harness) -> None:
    request = harness.submit(task_id="same")
    twin = harness.submit(task_id="same", is_redelivered=True)
    harness.child(0).die()
    refilled(harness)
    child = harness.child(0)
    assert child.runs == ["same"]
    child.accept(request)
    child.done(request)
    assert request.heard == twin.heard == ["accepted", "done"]


def test_a_twin_of_what_is_revoked_before_it_starts_is_revoked_too(harness: Harness) -> None:
    request = harness.submit(task_id="same")
    twin = harness.submit(task_id="same", is_redelivered=True)
    harness.child(0).die()  # before the input began: it waits again
    harness.revoke(request)
    refilled(harness)
    assert harness.child(0).runs == []
    assert request.heard == twin.heard == ["revoked"], "or its message is never acknowledged"


def test_a_twin_that_is_terminated_stops_the_input_that_runs(harness: Harness) -> None:
    request = begun(harness, task_id="same")
    twin: Request = harness.submit(task_id="same", is_redelivered=True)
    twin.handle.terminate(15)
    child = harness.child(0)
    assert (request.heard, twin.heard) == (["accepted", "Terminated"], ["accepted", "Terminated"])
    assert child.stops == ["same"]
    child.gone(request)
