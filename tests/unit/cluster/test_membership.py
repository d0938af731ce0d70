"""What workers know of each other, and which of them are lost: a simulation on a real Redis."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.testing import Server, eventually
from tests import outages
from tests.cluster_harness import Project, leave_record

TTL = 15


@pytest.fixture
def app(gw_broker: Server) -> Iterator[Celery]:
    with Celery("cluster", broker=gw_broker.broker_url, set_as_current=False) as app:
        yield app


@pytest.fixture
def client(gw_broker: Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(gw_broker.socket)) as client:
        yield client


@pytest.fixture
def project(app: Celery, client: redis.Redis) -> Iterator[Project]:
    with Project(app, client).running() as project:
        yield project


@pytest.fixture
def three(project: Project) -> Project:
    for name in ("a@h", "b@h", "c@h"):
        project.add(name)
    project.after(TTL + 5)
    return project


def left(client: redis.Redis) -> list[bytes]:
    """The keys of all workers, without their tombstones."""
    keys: Any = client.keys("gw:*")
    return [key for key in keys if not key.startswith(b"gw:dead:")]


# -- what they know --


def test_workers_know_each_other_and_one_that_leaves_is_forgotten_at_once(three: Project) -> None:
    assert three.known("a@h") == ["b@h", "c@h"]
    three.workers.pop("b@h").leave()
    three.after(1)
    assert three.known("a@h") == ["c@h"]
    assert len(three.alive()) == 2
    three.close()
    assert left(three.client) == [], "a worker that stops leaves nothing"
    lifetimes = [three.client.ttl(f"gw:dead:{name}") for name in three.tombstones()]
    assert len(lifetimes) == 3
    assert all(0 < lifetime <= 60 for lifetime in lifetimes), "for commands still on their way"


def test_a_record_is_what_the_worker_told_last(project: Project) -> None:
    one, two = project.add("a@h", slots=8), project.add("b@h")
    project.after(2)
    seen = two.others["a@h"]
    assert (seen.worker, seen.serves, seen.incarnation) == ("a@h", ",model", one.incarnation)
    assert (seen.services["model"].slots, seen.services["model"].queues) == (8, "gpu.A100.model")
    one.tell(score=2.5, is_scaled=False)
    project.after(2)
    seen = two.others["a@h"]
    assert (seen.services["model"].score, seen.size) == (2.5, None)


def test_what_cannot_be_read_harms_no_worker_and_may_be_of_another_version(three: Project) -> None:
    newer = json.dumps({"version": 99, "worker": "new@h"})
    odd = {"odd": "{not json", "newer": newer}
    three.client.hset("gw:records", mapping=odd)
    three.client.zadd("gw:alive", dict.fromkeys(odd, 1e9 + three.now))
    three.after(2)
    assert three.known("a@h") == ["b@h", "c@h"]
    assert three.client.hexists("gw:records", "newer")


def test_a_record_of_none_that_beats_is_removed(three: Project) -> None:
    incarnation = three.workers["b@h"].incarnation
    written: Any = three.client.hget("gw:records", incarnation)
    three.client.hset("gw:records", "ghost@h:1.0", written.replace(b"b@h", b"ghost@h"))
    three.after(2)
    assert three.known("a@h") == ["b@h", "c@h"]
    assert not three.client.hexists("gw:records", "ghost@h:1.0")


def test_a_worker_that_starts_again_under_its_name_counts_once(three: Project) -> None:
    three.add("b@h")  # its first life was killed
    three.after(2)
    assert three.known("a@h") == ["b@h", "c@h"]
    assert three.known("b@h") == ["a@h", "c@h"]
    assert len(three.alive()) == 4
    three.after(TTL + 2)
    assert len(three.tombstones()) == 1
    assert three.known("a@h") == ["b@h", "c@h"]


def test_the_more_workers_there_are_the_more_rarely_each_reads(project: Project) -> None:
    project.add("a@h")
    names = [f"w{number}@h:1.0" for number in range(499)]
    project.client.zadd("gw:alive", dict.fromkeys(names, 1e9 + project.now))
    project.after(2)
    project.add("b@h")
    project.after(3)
    assert project.known("a@h") == [], "it reads every five seconds"
    assert project.known("b@h") == ["a@h"]
    project.after(2)
    assert project.known("a@h") == ["b@h"]


def test_records_are_read_only_where_something_depends_on_them(three: Project) -> None:
    one = three.add("fixed@h", reads=False)
    three.after(3)
    assert one.others == {}
    assert three.known("a@h") == ["b@h", "c@h", "fixed@h"]
    one.read_others()
    three.after(1)
    assert three.known("fixed@h") == ["a@h", "b@h", "c@h"]


def test_a_project_that_is_used_no_more_is_forgotten(three: Project) -> None:
    assert 0 < three.client.ttl("gw:records") <= 7 * 86_400
    assert three.client.ttl("gw:alive") == -1, "what a lost worker held is looked for by its name"


def test_keys_begin_as_those_of_the_broker(app: Celery, client: redis.Redis) -> None:
    app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    with Project(app, client).running() as project:
        project.add("a@h", {"q": {"model": 2}})
        project.after(2)
        keys: Any = client.keys("*gw:*")
        assert set(keys) == {b"shop:gw:alive", b"shop:gw:records", b"shop:gw:wait:q"}


# -- who is lost --


@pytest.mark.parametrize("seconds", [4, TTL + 1, 10 * TTL])
def test_no_worker_is_lost_because_redis_was_away(three: Project, seconds: int) -> None:
    three.is_away = True
    three.after(seconds)
    three.is_away = False
    three.after(3 * TTL)
    assert three.tombstones() == set()
    assert three.known("a@h") == ["b@h", "c@h"]


@pytest.mark.parametrize("shift", [3600.0, -3600.0, 20.0, -20.0])
def test_no_worker_is_lost_because_the_clock_of_redis_was_set(three: Project, shift: float) -> None:
    three.shift = shift
    three.after(3 * TTL)
    assert three.tombstones() == set()
    assert three.known("a@h") == ["b@h", "c@h"]


@pytest.mark.parametrize("shift", [3600.0, -3600.0])
def test_a_clock_that_is_set_keeps_no_dead_worker_alive(three: Project, shift: float) -> None:
    three.workers.pop("b@h")
    three.shift = shift
    three.after(2 * TTL)
    assert len(three.tombstones()) == 1
    assert three.known("a@h") == ["c@h"]


def test_no_worker_is_lost_because_the_clock_of_redis_is_set_little_by_little(
    three: Project,
) -> None:
    killed = three.workers.pop("b@h").incarnation
    for _ in range(3 * TTL):
        three.shift += 0.2
        three.after(1)
    assert three.tombstones() == set()
    three.after(TTL + 5)
    assert three.tombstones() == {killed}


def test_no_worker_is_lost_because_redis_lost_its_data(three: Project) -> None:
    three.client.flushall()
    three.after(1)
    assert len(three.alive()) == 3
    three.after(3 * TTL)
    assert three.tombstones() == set()
    assert three.known("a@h") == ["b@h", "c@h"]


def test_a_killed_worker_is_declared_once_and_leaves_nothing_but_its_tombstone(
    three: Project, caplog: pytest.LogCaptureFixture
) -> None:
    killed = three.workers.pop("b@h").incarnation
    three.after(TTL - 1)
    assert three.tombstones() == set()
    three.after(3)
    assert three.tombstones() == {killed}
    assert three.client.get(f"gw:dead:{killed}") is not None
    assert caplog.text.count("is lost: it has not been seen for 15 s") == 1
    assert not three.client.hexists("gw:records", killed)
    eventually(lambda: three.after(1) or killed not in three.alive())
    assert three.known("a@h") == ["c@h"]
    assert 6 * 86_400 < three.client.ttl(f"gw:dead:{killed}") <= 7 * 86_400


def test_a_worker_that_has_beaten_since_its_beat_was_read_is_not_declared(
    three: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, asked = redis.Redis.eval, []

    def evaluate_late(client: redis.Redis, *arguments: Any) -> Any:
        three.workers["b@h"].run_round()
        asked.append(arguments)
        return evaluate(client, *arguments)

    monkeypatch.setattr(redis.Redis, "eval", evaluate_late)
    three.after(TTL + 1, frozen=["b@h"])
    assert asked
    assert three.tombstones() == set()
    assert len(three.alive()) == 3


def test_a_frozen_worker_finds_its_tombstone_and_goes_on_as_another(
    three: Project, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = three.workers["b@h"]
    before = frozen.incarnation
    three.after(TTL + 5, frozen=["b@h"])
    assert three.tombstones() == {before}
    three.after(3)
    assert frozen.incarnation != before
    assert "has declared this worker lost" in caplog.text
    assert three.known("a@h") == ["b@h", "c@h"]
    three.after(2 * TTL)
    assert three.tombstones() == {before}
    assert len(three.alive()) == 3


def test_a_worker_that_is_merely_slow_is_left_alone(three: Project) -> None:
    three.after(TTL - 2, frozen=["b@h"])
    three.after(TTL)
    assert three.tombstones() == set()


def test_a_worker_that_was_away_itself_declares_none_lost_for_a_ttl(three: Project) -> None:
    killed = three.workers.pop("b@h").incarnation
    three.after(TTL + 1, frozen=["a@h", "c@h"])
    three.after(TTL)
    assert three.tombstones() == set()
    assert three.known("a@h") == ["c@h"], "what is silent is not counted all the same"
    three.after(3)
    assert three.tombstones() == {killed}


def test_what_its_declarer_left_undone_is_done_by_another(three: Project) -> None:
    killed, declarer = three.workers.pop("b@h").incarnation, three.workers["c@h"].incarnation
    three.client.set(f"gw:dead:{killed}", declarer)  # which died as it had said so
    three.after(TTL + 3)
    assert killed in three.alive()
    three.after(TTL)
    eventually(lambda: three.after(1) or killed not in three.alive())


def test_nothing_is_taken_from_a_worker_that_woke_up_because_its_declarer_left_its_name(
    gw_broker: Server, app: Celery, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    app.conf.result_backend = gw_broker.result_url
    with Project(app, client).running() as project:
        for name in ("a@h", "b@h"):
            project.add(name)
        project.after(TTL + 5)
        woken = project.workers["b@h"]
        before = woken.incarnation
        project.after(TTL + 5, frozen=["b@h"])
        eventually(lambda: project.after(1, frozen=["b@h"]) or before not in project.alive())
        project.after(3)
        assert woken.incarnation != before
        eventually(lambda: project.after(1) or before not in project.alive())
        leave_record(app, woken.start, 7, "running")  # by now: it was not there as it was lost
        client.zadd("gw:alive", {before: 1e9 + project.now - 3 * TTL})
        eventually(lambda: project.after(1) or before not in project.alive())
        assert "acknowledged inputs: each" not in caplog.text
        project.workers.pop("b@h")
        project.after(TTL + 5)
        eventually(lambda: "with 1 acknowledged inputs: each" in caplog.text)
        eventually(lambda: app.AsyncResult("running").state == "FAILURE")


def test_a_worker_of_the_version_before_is_neither_seen_nor_harmed(three: Project) -> None:
    old = {"gw:workers": "old@h:1", "gw:beat:old@h:1": "1"}
    three.client.sadd("gw:workers", old["gw:workers"])
    three.client.set("gw:beat:old@h:1", 1)
    three.client.hset("gw:early:old@h:1", "7", "record")
    three.client.hset("gw:scale:gpu.A100.model", "old@h", "{}")
    three.client.hset("gw:load:gpu.A100.model", "old@h", "[1,0,null]")
    three.after(3 * TTL)
    assert three.known("a@h") == ["b@h", "c@h"]
    assert three.client.exists(*old, "gw:early:old@h:1", "gw:scale:gpu.A100.model") == 4
    assert three.client.hlen("gw:load:gpu.A100.model") == 1


# -- what is refused --


@pytest.mark.parametrize("kind", outages.REFUSALS)
def test_a_refused_beat_is_an_outage_and_no_death(
    three: Project, gw_broker: Server, kind: str
) -> None:
    before = {name: worker.incarnation for name, worker in three.workers.items()}
    with outages.refusing(gw_broker.socket, kind):
        three.after(TTL - 1)
        assert all(worker.error for worker in three.workers.values())
        assert not any(worker.outage for worker in three.workers.values())
        three.after(TTL + 1)
        for worker in three.workers.values():
            assert "no heartbeat has reached Redis for 30 s" in worker.outage
    three.after(3 * TTL)
    assert three.tombstones() == set()
    assert {name: worker.incarnation for name, worker in three.workers.items()} == before
    assert [(worker.error, worker.outage) for worker in three.workers.values()] == 3 * [(None, "")]
    assert three.known("a@h") == ["b@h", "c@h"]


def test_beats_that_are_refused_now_and_then_let_no_worker_be_declared_lost(
    three: Project, gw_broker: Server
) -> None:
    killed = three.workers.pop("b@h").incarnation
    for _ in range(4):
        with outages.refusing(gw_broker.socket, "OOM"):
            three.after(6)
        three.after(TTL - 6)
    assert three.tombstones() == set(), "others may have been refused where this one was not"
    three.after(10)
    assert three.tombstones() == {killed}


def test_a_worker_whose_loop_has_stood_still_for_long_stops_beating(three: Project) -> None:
    frozen = three.workers["b@h"]
    before = frozen.incarnation
    three.after(4 * TTL, stuck=["b@h"])
    assert three.tombstones() == set()
    three.after(TTL + 2, stuck=["b@h"])
    assert "event loop has not turned for 77 s" in str(frozen.error)
    assert three.tombstones() == {before}
    three.after(2)
    assert frozen.incarnation != before


def test_a_worker_that_waits_for_its_broker_goes_on_beating(three: Project) -> None:
    three.workers["b@h"].waits_for_broker()
    three.after(10 * TTL, stuck=["b@h"])
    assert three.tombstones() == set()


# -- what callers are told --

LIMITED = {"gpu.A100.model": {"model": 2}}
WAIT = "gw:wait:gpu.A100.model"


#: Of a worker that does 10 a second with one replica of two slots.
BUSY: Any = {"waiting": 10.0, "score": 10.0, "slots": 2}


def test_callers_are_told_what_is_ahead_over_what_all_workers_do(
    project: Project, client: redis.Redis
) -> None:
    client.rpush("gpu.A100.model", *range(20))
    project.add("a@h", LIMITED, **BUSY)
    project.after(2)
    assert float(str(client.get(WAIT), "utf-8")) == (20 * 2.0 + 10.0) / 10.0
    assert 4000 < client.pttl(WAIT) <= 5000
    project.add("b@h", LIMITED, **BUSY)
    project.after(3)
    assert float(str(client.get(WAIT), "utf-8")) == (20 * 2.0 + 20.0) / 20.0
    project.workers.pop("b@h").leave()
    project.after(3)
    assert float(str(client.get(WAIT), "utf-8")) == 5.0


def test_a_worker_that_serves_nothing_now_refuses_no_input(
    project: Project, client: redis.Redis
) -> None:
    one = project.add("a@h", LIMITED, **BUSY)
    project.after(2)
    assert client.exists(WAIT)
    one.tell(**{**BUSY, "slots": 0})
    project.after(2)
    assert not client.exists(WAIT)


# -- the length of the queues --


def test_the_lengths_of_all_queues_are_read_once_somebody_follows_them(
    project: Project, client: redis.Redis
) -> None:
    one, read = project.add("a@h"), []
    client.rpush("gpu.A100.model", 1, 2)
    client.rpush("celery\x06\x163", 1)  # kombu's list of a priority
    project.after(5)
    assert one.reading() is None
    one.follow(lambda: read.append(one.reading()))
    project.after(5)
    reading = one.reading()
    assert reading is not None
    assert reading.lengths == {"gpu.A100.model": (2, None), "celery": (1, None)}
    assert (reading.others, read[-1]) == ([], reading)
    project.now += 6.0
    assert one.reading() is None, "it says nothing about now"


def test_workers_that_come_together_meet_before_anything_is_decided(project: Project) -> None:
    one = project.add("a@h")

    def seconds_until_known() -> int:
        for second in range(60):
            if one.reading() is not None:
                return second
            project.after(1)
        raise AssertionError

    project.after(1)
    one.follow(lambda: None)
    assert 2 <= seconds_until_known() <= 4
    project.is_away = True
    project.after(10)
    assert one.reading() is None
    project.is_away = False
    assert 12 <= seconds_until_known() <= 14, "others may have hung for two more of their waits"
    project.is_away = True
    project.after(1)
    project.now += 6.0
    project.is_away = False
    assert 9 <= seconds_until_known() <= 11, "no longer than the outage was"


def test_who_is_back_first_after_an_outage_decides_nothing_alone(project: Project) -> None:
    one, others = project.add("a@h"), []
    project.add("b@h")
    project.after(1)
    one.follow(lambda: others.append(sorted(one.others)))
    project.after(5)
    others.clear()
    project.is_away = True
    project.after(TTL + 5)
    project.is_away = False
    project.after(6, frozen=["b@h"])  # it hangs as it connects
    project.after(15)
    assert others
    assert all(names == ["b@h"] for names in others)


def test_nothing_is_decided_by_a_round_while_the_autoscaler_begins(project: Project) -> None:
    one, read = project.add("a@h", LIMITED), []
    project.after(2)
    project.now += 1.0
    rounds = iter([one.run_round])  # of the thread, which runs already

    def on_clock() -> None:
        for run_round in rounds:
            run_round()
            read.append("a round")

    project.on_clock = on_clock
    one.follow(lambda: read.append(one.reading()))
    assert read == ["a round"]


def test_it_looks_more_often_while_nothing_is_loaded_and_at_once(
    app: Celery, client: redis.Redis
) -> None:
    project = Project(app, client)  # on the clock of this process
    one = project.add("a@h")
    looks: list[float] = []
    one.follow(lambda: looks.append(time.monotonic()), starts=True)
    eventually(lambda: len(looks) == 1)
    one.at_zero(is_at_zero=True)
    began = time.monotonic()
    eventually(lambda: len(looks) >= 4)
    assert looks[1] - began < 0.5
    assert looks[3] - looks[1] < 1.0
    assert one.close()


def test_without_a_redis_a_worker_stands_alone_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    with Celery(broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        one = Project(app, None).add("a@h")
        has_read = threading.Event()
        with caplog.at_level(logging.INFO):
            one.begin()
            assert not one.has_thread, "there is nothing to do for it"
            one.follow(has_read.set, starts=True)
            assert has_read.wait(10)
        reading = one.reading()
        assert reading is not None
        assert (reading.lengths, reading.others, one.is_alone) == (None, None, True)
        assert not one.records_early
        assert one.close()
    assert [line for line in caplog.messages if "stands alone" in line] == caplog.messages


# -- its thread --


def test_a_redis_that_hangs_holds_neither_the_loop_nor_the_end_up(
    app: Celery, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Project(app, client).add("a@h")
    hangs, is_free = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        is_free.wait(30)

    one.hang(monkeypatch, hang)
    one.follow(lambda: None, starts=True)
    assert hangs.wait(10)
    began = time.monotonic()
    one.tell()
    assert one.reading() is None
    assert not one.close(0.05)
    assert time.monotonic() - began < 1.0
    is_free.set()
    eventually(lambda: one.close(0.1))


def test_an_outage_is_logged_when_it_begins_and_when_it_ends(
    app: Celery, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    what = "this worker and the others cannot exchange records"
    one = Project(app, client).add("a@h")
    one.at_zero(is_at_zero=True)
    with pytest.MonkeyPatch.context() as patch:
        rounds: list[None] = []
        one.hang(patch, lambda: rounds.append(None))
        one.begin()
        eventually(lambda: len(rounds) >= 3)
    eventually(lambda: len(caplog.messages) >= 2)
    assert caplog.messages == [
        f"{what}: ConnectionError('gone'); tried again until it works",
        f"this outage is over after {caplog.messages[1].split()[5]} s: {what}",
    ]
    assert one.close()
    assert left(client) == [], "it left"


def test_what_is_closed_does_not_start(app: Celery, client: redis.Redis) -> None:
    one = Project(app, client).add("a@h")
    assert one.close()
    one.begin()
    assert not one.has_thread
    assert client.keys("gw:*") == []


def test_the_handler_of_a_signal_may_end_a_thread_that_it_interrupts_the_start_of(
    app: Celery, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cold shutdown: the pool ends in the handler, wherever its loop was."""
    one, start = Project(app, client).add("a@h"), threading.Thread.start

    def end(*_: object) -> None:
        one.begin()
        one.at_zero(is_at_zero=True)
        one.close(5.0)

    def start_interrupted(thread: threading.Thread) -> None:
        signal.raise_signal(signal.SIGQUIT)
        start(thread)

    before = signal.signal(signal.SIGQUIT, end)
    try:
        monkeypatch.setattr(threading.Thread, "start", start_interrupted)
        one.begin()
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert one.close(5.0)
