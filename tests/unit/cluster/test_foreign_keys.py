"""Keys and fields of another type or encoding among those that workers share in Redis.

Each harms at most the service that it is about; it is reported, and removed where it is ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.testing import Server, eventually
from tests.cluster_harness import Answerer, Project, counts_of, holders, leave_record

TTL = 15


@pytest.fixture
def app(gw_broker: Server) -> Iterator[Celery]:
    with Celery(
        "foreign",
        broker=gw_broker.broker_url,
        backend=gw_broker.result_url,
        set_as_current=False,
    ) as app:
        yield app


@pytest.fixture
def client(gw_broker: Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(gw_broker.socket)) as client:
        yield client


@pytest.fixture
def two(app: Celery, client: redis.Redis) -> Iterator[Project]:
    with Project(app, client).running() as project:
        for name in ("a@h", "b@h"):
            project.add(name, slots=2)
        project.after(TTL + 5)
        yield project


Write = Callable[[Any, str], object]
WRONG: dict[str, Write] = {
    "string": lambda client, key: client.set(key, b"\xff"),
    "list": lambda client, key: client.rpush(key, "x"),
    "set": lambda client, key: client.sadd(key, "x"),
    "hash": lambda client, key: client.hset(key, "x", "y"),
    "zset": lambda client, key: client.zadd(key, {"x": 1}),
    "stream": lambda client, key: client.xadd(key, {"x": "y"}),
}


def write(client: redis.Redis, key: str, kind: str) -> None:
    client.delete(key)
    WRONG[kind](client, key)


# -- beats and records --


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        *(("gw:alive", kind) for kind in WRONG if kind != "zset"),
        *(("gw:records", kind) for kind in WRONG if kind != "hash"),
    ],
)
def test_a_shared_key_of_another_type_is_replaced_and_none_is_lost(
    two: Project, key: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(two.client, key, kind)
    two.after(4)
    assert two.known("a@h") == ["b@h"]
    assert two.known("b@h") == ["a@h"]
    assert all(worker.error is None for worker in two.workers.values())
    assert [line for line in caplog.messages if "it is deleted" in line] == [
        f"the key {key} in Redis was a {kind}, but only workers of gw_celery may write it, as a "
        f"{'zset' if key == 'gw:alive' else 'hash'}: it is deleted. Find out what wrote it"
    ]
    two.after(3 * TTL)
    assert two.tombstones() == set()


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "string"])
def test_a_tombstone_of_another_type_is_one(two: Project, kind: str) -> None:
    # All scripts ask only whether it exists: the worker can take nothing under this name.
    worker = two.workers["b@h"]
    before = worker.incarnation
    write(two.client, f"gw:dead:{before}", kind)
    two.after(3)
    assert worker.incarnation != before
    assert (worker.error, worker.outage) == (None, "")
    assert two.known("a@h") == ["b@h"]


def test_a_tombstone_of_another_encoding_is_one(two: Project) -> None:
    worker = two.workers["b@h"]
    before = worker.incarnation
    two.client.set(f"gw:dead:{before}", b"\xff\x1b[2J")
    two.after(3)
    assert worker.incarnation != before
    assert worker.error is None


@pytest.mark.parametrize("beat", [float("-inf"), 0.0, None, float("inf")])
@pytest.mark.parametrize("name", [b"\xff\xfe", b"", b"no worker", b"a\nb\x1b[2J"])
def test_a_beat_of_no_worker_is_removed(
    two: Project, name: bytes, beat: float | None, client: redis.Redis
) -> None:
    score = 1e9 + two.now if beat is None else beat
    client.zadd("gw:alive", {name: score})
    two.after(2)
    assert two.known("a@h") == ["b@h"]
    assert all(worker.error is None for worker in two.workers.values())
    two.after(TTL)
    eventually(lambda: two.after(1) or client.zscore("gw:alive", name) is None)
    assert two.known("a@h") == ["b@h"]


ODD: dict[str, bytes | str] = {
    "no JSON": "{not json",
    "not text": b"\xff\xfe",
    "nested": "[" * 100_000,
    "a list": "[]",
    "a huge number": "9" * 5000,
    "no services": json.dumps({"version": 1, "worker": "odd@h", "services": []}),
    "a name that is none": json.dumps({"version": 1, "worker": 7}),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_record_that_is_none_is_reported_once_and_the_others_are_read(
    two: Project, odd: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    two.client.hset("gw:records", "odd@h:1.0", odd)  # type: ignore[arg-type]
    two.client.zadd("gw:alive", {"odd@h:1.0": 1e9 + two.now})
    two.after(5)
    assert two.known("a@h") == ["b@h"]
    lines = [line for line in caplog.messages if "cannot be read" in line]
    assert len(lines) == len(two.workers), "each worker says it once"
    assert all("odd@h:1.0" in line and len(line) < 1500 for line in lines)
    two.after(2 * TTL)
    assert not two.client.hexists("gw:records", "odd@h:1.0"), "none writes it"


@pytest.mark.parametrize(
    "part", [None, "x", {}, [], ["q", "x", 1, 1, 1, 1, 1, 1], ["q", 1e300, 1, 1, 1, 1, 1, 1]]
)
@pytest.mark.parametrize("field", ["services", "loads"])
def test_a_part_of_a_record_that_is_none_harms_its_own_service_alone(
    two: Project, field: str, part: Any, caplog: pytest.LogCaptureFixture
) -> None:
    worker = two.workers["b@h"]
    written: Any = two.client.hget("gw:records", worker.incarnation)
    record = json.loads(written)
    record["worker"] = "odd@h"
    record[field]["odd"] = part
    two.client.hset("gw:records", "odd@h:1.0", json.dumps(record))
    two.client.zadd("gw:alive", {"odd@h:1.0": 1e9 + two.now})
    two.after(3)
    assert two.known("a@h") == ["b@h", "odd@h"]
    seen = two.workers["a@h"].others["odd@h"]
    assert seen.services == two.workers["a@h"].others["b@h"].services
    assert "odd" not in seen.loads
    lines = [line for line in caplog.messages if "cannot be read" in line]
    assert len(lines) == len(two.workers)
    assert all("odd@h:1.0" in line and "odd" in line for line in lines)


# -- the length of the queues, and waits --


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "list"])
def test_a_queue_of_another_type_is_reported_and_the_others_are_counted(
    two: Project, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, worker = two.client, two.workers["a@h"]
    worker.follow(lambda: None)
    client.rpush("celery", 1, 2)
    two.after(5)
    write(client, "gpu.A100.model", kind)
    client.rpush("gpu.A100.model\x06\x163", 1)
    two.after(5)
    reading = worker.reading()
    assert reading is not None
    assert reading.lengths == {"celery": (2, None), "gpu.A100.model": (1, None)}
    assert reading.others == ["b@h"]
    assert (worker.error, worker.outage) == (None, "")
    (line,) = [line for line in caplog.messages if "gpu.A100.model" in line]
    assert "is not a list" in line
    client.delete("gpu.A100.model")
    client.rpush("gpu.A100.model", 1)
    two.after(2)
    write(client, "gpu.A100.model", kind)
    two.after(2)
    assert len([line for line in caplog.messages if "is not a list" in line]) == 2


@pytest.mark.parametrize("kind", WRONG)
def test_an_estimate_of_another_type_is_overwritten(
    app: Celery, client: redis.Redis, kind: str
) -> None:
    wait = "gw:wait:gpu.A100.model"
    with Project(app, client).running() as project:
        limited = {"gpu.A100.model": {"model": 2}}
        project.add("a@h", limited, waiting=10.0, score=10.0, slots=2)
        write(client, wait, kind)
        project.after(3)
        assert float(str(client.get(wait), "utf-8")) == 1.0


# -- counts of poison inputs --


@pytest.mark.parametrize("suffix", ["", ".returns"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_count_of_another_type_is_unknown_and_counted_anew(
    two: Project, kind: str, suffix: str
) -> None:
    client, counts = two.client, counts_of(two.workers["a@h"])
    write(client, f"gw:deaths:x{suffix}", kind)
    client.set("gw:deaths:y", 2)
    assert counts.asked("x", two.after) == (None, None)
    assert counts.asked("y", two.after) == (2, None)
    counts.record("x", is_return=bool(suffix))
    two.after(2)
    assert client.get(f"gw:deaths:x{suffix}") == b"1"
    assert 0 < client.ttl(f"gw:deaths:x{suffix}") <= 86_400
    assert two.workers["a@h"].error is None


@pytest.mark.parametrize("value", [b"-5", b"9223372036854775807", b"1.5", b"nan", b"9" * 5000])
def test_a_count_that_no_worker_can_have_written_is_unknown(two: Project, value: bytes) -> None:
    two.client.set("gw:deaths:x", value)
    assert counts_of(two.workers["a@h"]).asked("x", two.after) == (None, None)


# -- what lost workers leave --


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "hash"])
@pytest.mark.parametrize("whose", ["lost", "own"])
def test_early_records_of_another_type_hold_up_no_other_answer(
    app: Celery, client: redis.Redis, kind: str, whose: str
) -> None:
    results, answerer = app.backend.client, Answerer(app, "a@h:1")
    start = {"lost": "b@h:1", "own": "a@h:1"}[whose]
    write(results, f"gw:early:{start}", kind)
    leave_record(app, "c@h:1", 7, "running")
    assert answerer.answer("b@h:1.0", "c@h:1.0")
    assert app.AsyncResult("running").state == "FAILURE"
    assert not results.exists("gw:early:a@h:1", "gw:early:b@h:1", "gw:early:c@h:1")


@pytest.mark.parametrize(
    ("field", "record"),
    [
        (b"\xff", b"{}"),
        (b"7", b"\xff\xfe"),
        (b"7", b"{}"),
        (b"7", b'{"id": "x"}'),
        (b"7", b'{"id": "x", "task": 7, "ignore_result": null}'),
        (b"7", b"[" * 100_000),
        (b"", b"{}"),
        (b"b@h:1/", b'{"id": "x"}'),
    ],
)
def test_an_early_record_that_is_none_is_dropped_and_the_others_are_answered(
    app: Celery, field: bytes, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answerer = Answerer(app, "a@h:1")
    leave_record(app, "b@h:1", 8, "running")
    app.backend.client.hset("gw:early:b@h:1", field, record)
    assert answerer.answer("b@h:1.0")
    assert not answerer.tries_again
    assert app.AsyncResult("running").state == "FAILURE"
    assert not app.backend.client.exists("gw:early:a@h:1", "gw:early:b@h:1")
    assert "unreadable record" in caplog.text


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "hash"])
def test_holds_of_another_type_hold_up_nothing_of_other_lost_workers(
    app: Celery, client: redis.Redis, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    answerer = Answerer(app, "a@h:1")
    write(client, "gw:hold:b@h:1.0", kind)
    client.hset("gw:hold:c@h:1.0", "1", b"celery\n{}")
    assert answerer.answer("b@h:1.0", "c@h:1.0")
    assert client.lrange("celery", 0, -1) == [b"{}"]
    assert client.keys("gw:hold:*") == []
    assert "the key gw:hold:b@h:1.0 in Redis was" in caplog.text


def test_holds_of_another_type_do_not_keep_a_worker_from_leaving(
    two: Project, client: redis.Redis
) -> None:
    worker = two.workers.pop("b@h")
    client.set(f"gw:hold:{worker.incarnation}", "x")
    worker.acknowledge(1)
    worker.leave()
    assert worker.incarnation not in two.alive()
    assert not client.exists(f"gw:hold:{worker.incarnation}")


def test_an_operator_lists_and_reclaims_beside_foreign_keys(
    app: Celery, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    listing = holders(app, 4.0)
    client.hset("gw:hold:b@h:1.0", "1", b"celery\n{}")
    client.set("gw:hold:odd@h:1.0", "x")
    client.hset(b"gw:hold:\xff", "1", b"celery\n{}")
    client.zadd("gw:alive", {b"\xff": 1.0})
    with caplog.at_level(logging.WARNING):
        assert [held.incarnation for held in listing.listed()] == ["b@h:1.0", "odd@h:1.0"]
        assert listing.reclaim() == {"b@h:1.0": 1, "odd@h:1.0": 0}
    assert client.llen("celery") == 1
    assert not client.exists("gw:hold:odd@h:1.0")
