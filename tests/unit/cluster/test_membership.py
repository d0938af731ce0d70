"""What workers know of each other, and which of them are lost: a simulation on a real Redis."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import redis
from celery import Celery

from gw_celery import devserver
from gw_celery.cluster import early_acks, liveness, membership, queue_lengths
from gw_celery.protocol import snapshot, worker_record
from gw_celery.testing import eventually
from tests.unit.cluster.project import Project

TTL = 15
Make = Callable[..., Project]


@pytest.fixture
def app(gw_broker: devserver.Server) -> Iterator[Celery]:
    with Celery("cluster", broker=gw_broker.broker_url, set_as_current=False) as app:
        yield app


@pytest.fixture
def client(gw_broker: devserver.Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(gw_broker.socket)) as client:
        yield client


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, app: Celery, client: redis.Redis) -> Iterator[Project]:
    project = Project(monkeypatch, app, client)
    yield project
    project.close()


@pytest.fixture
def three(project: Project) -> Project:
    for name in ("a@h", "b@h", "c@h"):
        project.add(name)
    project.after(TTL + 5)
    return project


# -- what they know --


def test_workers_know_each_other_and_one_that_leaves_is_forgotten_at_once(three: Project) -> None:
    assert three.known("a@h") == ["b@h", "c@h"]
    three.workers.pop("b@h").leave()
    three.after(1)
    assert three.known("a@h") == ["c@h"]
    assert len(three.alive()) == 2
    assert three.tombstones() == set()
    three.close()
    assert three.client.keys("gw:*") == [], "who stops leaves nothing"


def test_a_record_is_what_the_worker_told_last(project: Project) -> None:
    one, _ = project.add("a@h", ready_slots={"model": 8}), project.add("b@h")
    project.after(2)
    (seen,) = project.workers["b@h"].others
    assert (seen.worker, seen.serves, seen.incarnation) == ("a@h", ",model", one.incarnation)
    assert (seen.services["model"].slots, seen.services["model"].queues) == (8, "gpu.A100.model")
    one.tell(snapshot.Worker(hostname="a@h", scores={"model": snapshot.Score(value=2.5)}), None)
    project.after(2)
    (seen,) = project.workers["b@h"].others
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
    written = worker_record.WorkerRecord(worker="ghost@h").dumps()
    three.client.hset("gw:records", "ghost@h:1.0", written)
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
    one = project.add("a@h")
    names = [f"w{number}@h:1.0" for number in range(499)]
    project.client.zadd("gw:alive", dict.fromkeys(names, 1e9 + project.now))
    project.after(1)
    assert one._records_period == 5.0
    project.after(1)
    two = project.add("b@h")
    project.after(2)
    assert project.known("a@h") == []
    assert project.known("b@h") == ["a@h"]
    project.after(3)
    assert project.known("a@h") == ["b@h"]
    assert two.others


def test_records_are_read_only_where_something_depends_on_them(three: Project, app: Celery) -> None:
    three.workers["fixed@h"] = one = membership.Membership(app, "fixed@h", {"": []}, {}, TTL)
    three.after(3)
    assert one.others == ()
    assert three.known("a@h") == ["b@h", "c@h", "fixed@h"]
    one.read_others()
    three.after(1)
    assert three.known("fixed@h") == ["a@h", "b@h", "c@h"]


def test_a_project_that_is_used_no_more_is_forgotten(three: Project) -> None:
    assert 0 < three.client.ttl("gw:records") <= 7 * 86_400
    assert 0 < three.client.ttl("gw:alive") <= 7 * 86_400


def test_keys_begin_as_those_of_the_broker(
    monkeypatch: pytest.MonkeyPatch, app: Celery, client: redis.Redis
) -> None:
    app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    project = Project(monkeypatch, app, client)
    project.add("a@h", {"q": {"model": 2}})
    project.after(2)
    keys: Any = client.keys("*gw:*")
    assert set(keys) == {b"shop:gw:alive", b"shop:gw:records", b"shop:gw:wait:q"}
    project.close()


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


def test_a_silent_worker_counts_no_more_also_between_two_readings(three: Project) -> None:
    three.workers.pop("b@h")
    three.workers["a@h"]._next_records = math.inf
    three.after(TTL + 2)
    assert three.known("a@h") == ["c@h"]


def test_a_worker_that_has_beaten_since_its_beat_was_read_is_not_declared(
    project: Project, client: redis.Redis
) -> None:
    keys = ("gw:alive", "gw:dead:a", "gw:records")

    def declare(beat: str) -> Any:
        return client.eval(liveness.DECLARE, len(keys), *keys, "a", beat, "me", 60)

    client.zadd("gw:alive", {"a": 100.5})
    assert declare("99.5") == 0
    assert not client.exists("gw:dead:a")
    assert declare("100.5") == liveness.DECLARED
    assert declare("100.5") == liveness.WAS_DECLARED
    assert client.get("gw:dead:a") == b"me"


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
    three: Project,
) -> None:
    before = three.workers["b@h"].incarnation
    three.after(TTL + 5, frozen=["b@h"])
    three.after(3)
    taken: list[str] = []
    for name, worker in three.workers.items():
        lost = types.SimpleNamespace(take=taken.append, answered=(), close=lambda: None)
        lost.has_own = lambda: False
        worker.lost = cast(Any, lost)
        assert worker.incarnation != before, name
    three.client.zadd("gw:alive", {before: 1e9 + three.now - 3 * TTL})
    three.after(TTL)
    assert taken == []
    assert before not in three.alive()
    three.workers.pop("b@h")
    three.after(TTL + 5)
    assert set(taken) == {early_acks.start_of(before) + ".1"}


def test_without_a_ttl_none_is_declared_lost_and_the_silent_do_not_count(
    monkeypatch: pytest.MonkeyPatch, app: Celery, client: redis.Redis
) -> None:
    project = Project(monkeypatch, app, client, ttl=None)
    for name in ("a@h", "b@h"):
        project.add(name)
    project.after(TTL + 5)
    project.workers.pop("b@h")
    project.after(3 * TTL)
    assert project.tombstones() == set()
    assert project.known("a@h") == []
    project.close()


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


CROSSSLOT = "return redis.error_reply('CROSSSLOT Keys in request do not hash to the same slot')"


@pytest.mark.parametrize("is_cluster", [False, True])
def test_where_scripts_are_refused_workers_know_each_other_and_declare_none(
    app: Celery,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_cluster: bool,
) -> None:
    monkeypatch.setattr(liveness.Trust, "beat", lambda *_: True)
    workers = [membership.Membership(app, name, {"": ["q"]}, {}, 15.0) for name in ("a@h", "b@h")]
    one, two = workers
    if is_cluster:
        monkeypatch.setattr(liveness, "BEAT", CROSSSLOT)
    else:
        client.execute_command("ACL", "SETUSER", "default", "-@scripting")
    try:
        for worker in workers:
            worker.read_others()
        for worker in [*workers, *workers]:
            worker._next_beat = worker._next_records = 0.0
            worker.run_round()
        assert [other.incarnation for other in one.others] == [two.incarnation]
        client.zadd("gw:alive", {two.incarnation: 1.0})
        one._next_beat = 0.0
        one.run_round()
        assert one.others == ()
        assert not client.exists(f"gw:dead:{two.incarnation}")
        assert len([line for line in caplog.messages if "refuses scripts" in line]) == 2
        client.set(f"gw:dead:{two.incarnation}", "c@h:1.0")
        two._next_beat = 0.0
        two.run_round()
        assert two.incarnation.endswith(".1")
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@scripting")
        for worker in workers:
            worker.leave()


# -- what callers are told --

LIMITED = {"gpu.A100.model": {"model": 2}}
WAIT = "gw:wait:gpu.A100.model"


def busy(waiting: float, score: float | None = 10.0, slots: int = 2) -> dict[str, Any]:
    """The snapshot of a worker that does ``score`` a second with one replica of two slots."""
    return {
        "tallies": {"model": snapshot.Counters(waiting=waiting, arrived_inputs=7, mean=2.0)},
        "scores": {"model": snapshot.Score(value=score)},
        "ready_slots": {"model": slots},
    }


def test_callers_are_told_what_is_ahead_over_what_all_workers_do(
    project: Project, client: redis.Redis
) -> None:
    client.rpush("gpu.A100.model", *range(20))
    project.add("a@h", LIMITED, **busy(10.0))
    project.after(2)
    assert float(str(client.get(WAIT), "utf-8")) == (20 * 2.0 + 10.0) / 10.0
    assert 4000 < client.pttl(WAIT) <= 5000
    project.add("b@h", LIMITED, **busy(10.0))
    project.after(3)
    assert float(str(client.get(WAIT), "utf-8")) == (20 * 2.0 + 20.0) / 20.0
    project.workers.pop("b@h").leave()
    project.after(3)
    assert float(str(client.get(WAIT), "utf-8")) == 5.0


def test_a_worker_that_serves_nothing_now_refuses_no_input(
    project: Project, client: redis.Redis
) -> None:
    one = project.add("a@h", LIMITED, **busy(10.0))
    project.after(2)
    assert client.exists(WAIT)
    one.observe(snapshot.Worker(hostname="a@h", **busy(10.0, slots=0)))
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
    assert one.latest() is None
    one.follow(lambda: read.append(one.latest()))
    project.after(5)
    reading = one.latest()
    assert reading is not None
    assert reading.lengths == {
        "gpu.A100.model": queue_lengths.Length(2),
        "celery": queue_lengths.Length(1),
    }
    assert (reading.others, read[-1]) == ((), reading)
    project.now += 6.0
    assert one.latest() is None, "it says nothing about now"
    one.close()


def test_workers_that_come_together_meet_before_anything_is_decided(project: Project) -> None:
    one = project.add("a@h")

    def seconds_until_known() -> int:
        for second in range(60):
            if one.latest() is not None:
                return second
            project.after(1)
        raise AssertionError

    project.after(1)
    one.follow(lambda: None)
    one.close()  # its thread: the test drives it
    assert 2 <= seconds_until_known() <= 4
    project.is_away = True
    project.after(10)
    assert one.latest() is None
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
    one.follow(lambda: others.append([other.worker for other in one.others]))
    one.close()  # its thread: the test drives it
    project.after(5)
    others.clear()
    project.is_away = True
    project.after(TTL + 5)
    project.is_away = False
    project.after(6, frozen=["b@h"])  # it hangs as it connects
    project.after(15)
    assert others
    assert all(names == ["b@h"] for names in others)


def test_nothing_is_decided_by_a_round_while_the_autoscaler_begins(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, read = project.add("a@h", LIMITED), []
    project.after(2)
    project.now += 1.0
    is_inside = False

    def monotonic() -> float:
        nonlocal is_inside
        if not is_inside:
            is_inside = True
            one.run_round()  # of the thread, which runs already
        return project.now

    for name in ("start", "wake"):
        monkeypatch.setattr(one, name, lambda: None)
    monkeypatch.setattr(membership, "time", types.SimpleNamespace(monotonic=monotonic))
    one.follow(lambda: read.append(one.latest()))
    assert (is_inside, read) == (True, [])


def test_it_looks_more_often_while_nothing_is_loaded_and_at_once(app: Celery) -> None:
    one = membership.Membership(app, "a@h", {"": ["celery"]}, {}, 15.0)
    one.observe(snapshot.Worker(hostname="a@h"))
    looks: list[float] = []
    one.follow(lambda: looks.append(time.monotonic()))
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
        one = membership.Membership(app, "a@h", {"": ["celery"]}, {}, 15.0)
        has_read = threading.Event()
        with caplog.at_level(logging.INFO):
            one.begin()
            assert one._thread is None, "there is nothing to do for it"
            one.follow(has_read.set)
            assert has_read.wait(10)
        reading = one.latest()
        assert reading is not None
        assert (reading.lengths, reading.others, one.counts, one.is_alone) == (
            None,
            None,
            None,
            True,
        )
        assert one.close()
    assert [line for line in caplog.messages if "stands alone" in line] == caplog.messages


def test_a_redis_that_hangs_holds_neither_the_loop_nor_the_end_up(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = membership.Membership(app, "a@h", {"": ["celery"]}, {}, 15.0)
    hangs, is_free = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        hangs.set()
        is_free.wait(30)
        raise ConnectionError("gone")

    monkeypatch.setattr(one, "_exchange", hang)
    one.follow(lambda: None)
    assert hangs.wait(10)
    began = time.monotonic()
    one.tell(snapshot.Worker(hostname="a@h"), None)
    assert one.latest() is None
    assert not one.close(0.05)
    assert time.monotonic() - began < 1.0
    is_free.set()
    eventually(lambda: one.close(0.1))
