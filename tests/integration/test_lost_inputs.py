"""Workers that answer for what a lost one left, side by side, over a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from celery.backends.redis import RedisBackend
from celery.exceptions import WorkerLostError

from gw_celery.cluster import fence
from gw_celery.testing import Server
from tests import pooling
from tests.cluster_harness import Answerer, Project, leave_record

pytestmark = pytest.mark.integration

LOST = "lost@test:1"
INCARNATION = f"{LOST}.0"
RECORDS = f"gw:early:{LOST}"


@pytest.fixture
def client(redis_url: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(redis_url, result_url) as app:
        yield app


@pytest.fixture
def server(redis_server: Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as broker:
        yield broker


@pytest.fixture
def lose(client: Celery) -> Callable[..., None]:
    """Leave records of a worker that is gone."""

    def leave(*ids: str, **entries: Any) -> None:
        for number, task_id in enumerate(ids):
            leave_record(client, LOST, number, task_id, **entries)

    return leave


def other(client: Celery, start: str = "living@test:1") -> Answerer:
    return Answerer(client, start)


def answer(one: Answerer, lost: str = INCARNATION) -> bool:
    return one.answer(lost)


def test_many_workers_answer_for_each_input_once(
    client: Celery, lose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"t{number}" for number in range(40)]
    lose(*ids)
    threads = [
        threading.Thread(target=answer, args=(other(client, f"w{n}@test:1"),)) for n in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    said = [line for line in caplog.messages if "was running on lost@test" in line]
    assert sorted(line.split("[")[1].split("]")[0] for line in said) == sorted(ids)
    assert isinstance(client.AsyncResult("t0").result, WorkerLostError)
    assert client.backend.client.keys("gw:early:*") == []


def test_a_result_that_was_stored_stays(client: Celery, lose: Callable[..., None]) -> None:
    lose("done", "failed", "undone")
    client.backend.store_result("done", 42, "SUCCESS")
    client.backend.store_result("failed", ValueError("its own"), "FAILURE")
    assert answer(other(client))
    assert client.AsyncResult("done").result == 42
    assert isinstance(client.AsyncResult("failed").result, ValueError)
    assert client.AsyncResult("undone").state == "FAILURE"


def test_what_a_worker_took_over_before_it_was_killed_is_taken_from_it(
    client: Celery, lose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    lose("a")
    victim = other(client, "victim@test:1")
    victim.take_over(LOST)
    assert answer(other(client), "victim@test:1.0")
    assert "was running on lost@test" in caplog.text
    assert client.backend.client.keys("gw:early:*") == []


def test_a_failure_that_cannot_be_stored_is_tried_again_and_hides_no_other(
    client: Celery, lose: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose("a", "b")
    one, store = other(client), RedisBackend.mark_as_failure

    def refuse(backend: Any, task_id: str, *args: Any, **options: Any) -> None:
        if task_id == "a":
            raise ConnectionError("away")
        store(backend, task_id, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RedisBackend, "mark_as_failure", refuse)
        assert not answer(one)
        assert one.tries_again
    assert client.AsyncResult("b").state == "FAILURE"
    assert client.AsyncResult("a").state == "PENDING"
    assert answer(one)
    assert client.AsyncResult("a").state == "FAILURE"


@pytest.mark.parametrize("embed", [None, [], "odd"])
def test_an_input_whose_message_has_no_options_is_answered(
    client: Celery, lose: Callable[..., None], embed: object
) -> None:
    lose("a", embed=embed)
    assert answer(other(client))
    assert client.AsyncResult("a").state == "FAILURE"


@pytest.mark.parametrize("garbage", [b"garbage", b"", b"[]", b"{}", b'{"id": 1}', b"\xff"])
def test_a_record_that_cannot_be_read_is_dropped(
    client: Celery,
    lose: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    garbage: bytes,
) -> None:
    lose("a")
    client.backend.client.hset(RECORDS, "9", garbage)
    assert answer(other(client))
    assert "the unreadable record " in caplog.text
    assert client.AsyncResult("a").state == "FAILURE"


def test_an_ignored_result_is_not_stored(client: Celery, lose: Callable[..., None]) -> None:
    lose("a", ignore_result=True)
    assert answer(other(client))
    assert client.AsyncResult("a").state == "PENDING"


def test_what_its_replicas_left_is_removed_also_at_the_end(client: Celery) -> None:
    one, key = other(client), "gw:early:living@test:1"
    client.backend.client.hset(key, mapping={"1": "a", "2": "b", "3": "c"})
    assert one.forget([1, 3])
    assert client.backend.client.hkeys(key) == [b"2"]


def test_a_worker_that_stops_while_inputs_of_it_are_on_record_will_be_answered_for(
    client: Celery, server: redis.Redis
) -> None:
    one = Project(client, server).add("one@test")
    one.run_round()
    client.backend.client.hset(f"gw:early:{one.start}", "1", "a")
    one.leave()
    assert server.zrange("gw:alive", 0, -1) == [one.incarnation.encode()]
    assert not server.exists("gw:records")
    client.backend.client.delete(f"gw:early:{one.start}")
    one.leave()
    assert not server.exists("gw:alive")


def test_a_pool_records_early_inputs_beside_results_in_redis(
    client: Celery, server: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(client, server)
    assert project.add("plain@h").records_early
    fence.install_in_parent(client)
    assert project.add("pool@h").records_early
    monkeypatch.delenv("CELERY_RESULT_BACKEND")
    for backend in ("cache+memory://", "sentinel://localhost:1"):
        with Celery("other", broker=redis_url, backend=backend, set_as_current=False) as app:
            fence.install_in_parent(app)
            assert not Project(app, server).add("pool@h").records_early


def test_what_a_lost_worker_runs_after_it_woke_up_is_not_taken_from_it(
    client: Celery, lose: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("away")

    lose("a")
    living = other(client)
    with monkeypatch.context() as patch:
        patch.setattr(RedisBackend, "mark_as_failure", refuse)
        assert not answer(living)
    leave_record(client, LOST, 2, "b")
    # It is lost until this is done, and so it is taken again.
    assert answer(living)
    assert client.AsyncResult("a").state == "FAILURE"
    assert client.AsyncResult("b").state == "PENDING"
    assert client.backend.client.hexists(RECORDS, "2")


def test_records_lie_beside_the_results_under_their_prefix(
    client: Celery, lose: Callable[..., None]
) -> None:
    client.conf.result_backend_transport_options = {"global_keyprefix": "shop"}
    lose("a")
    assert client.backend.client.keys("*gw:*") == [f"shop_{RECORDS}".encode()]
    assert answer(other(client))
    assert client.AsyncResult("a").state == "FAILURE"
    assert client.backend.client.keys("*gw:*") == [f"shop_gw:dead:{INCARNATION}".encode()]
