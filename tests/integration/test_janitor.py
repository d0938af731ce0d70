"""Workers that answer for a lost one, side by side, over a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.backends.redis import RedisBackend
from celery.exceptions import WorkerLostError

from gw_celery import conf
from gw_celery.cluster import early_acks, lost_workers
from tests import pooling

pytestmark = pytest.mark.integration

LOST = "lost@test:1"
KEYS = early_acks.Keys("")


@pytest.fixture
def client(redis_url: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(redis_url, result_url) as app:
        yield app


@pytest.fixture
def lose(client: Celery) -> Callable[..., None]:
    """Leave records of a worker that is gone."""

    def leave(*ids: str, **entries: Any) -> None:
        redis = client.backend.client
        redis.sadd(KEYS.workers, LOST)
        for number, task_id in enumerate(ids):
            record = early_acks.write({"id": task_id, "task": "proj.embed", **entries}, None)
            redis.hset(KEYS.records(LOST), str(number), record)

    return leave


def other(client: Celery, name: str = "living@test") -> lost_workers.Janitor:
    return lost_workers.Janitor(client, name, lifetime=60.0)


def answer(one: lost_workers.Janitor, client: Celery) -> bool:
    backend = client.backend
    one._take_over(backend.client, KEYS, LOST)
    return one._answer_all(backend, KEYS)


def test_many_workers_answer_for_each_input_once(
    client: Celery, lose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"t{number}" for number in range(40)]
    lose(*ids)
    threads = [
        threading.Thread(target=answer, args=(other(client, f"w{n}@test"), client))
        for n in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    said = [line for line in caplog.messages if "was running on lost@test" in line]
    assert sorted(line.split("[")[1].split("]")[0] for line in said) == sorted(ids)
    assert isinstance(client.AsyncResult("t0").result, WorkerLostError)
    redis = client.backend.client
    assert not redis.exists(KEYS.records(LOST))
    assert not redis.sismember(KEYS.workers, LOST)


def test_a_result_that_was_stored_stays(client: Celery, lose: Callable[..., None]) -> None:
    lose("done", "failed", "undone")
    client.backend.store_result("done", 42, "SUCCESS")
    client.backend.store_result("failed", ValueError("its own"), "FAILURE")
    assert answer(other(client), client)
    assert client.AsyncResult("done").result == 42
    assert isinstance(client.AsyncResult("failed").result, ValueError)
    assert client.AsyncResult("undone").state == "FAILURE"


def test_what_a_worker_took_over_before_it_was_killed_is_taken_from_it(
    client: Celery, lose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    lose("a")
    victim, living = other(client, "victim@test"), other(client)
    redis = client.backend.client
    victim._take_over(redis, KEYS, LOST)
    living._take_over(redis, KEYS, victim.worker)
    assert living._answer_all(client.backend, KEYS)
    assert "was running on lost@test" in caplog.text
    assert not redis.exists(KEYS.records(victim.worker))


def test_a_failure_that_cannot_be_stored_is_tried_again(
    client: Celery, lose: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose("a", "b")
    one = other(client)

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(RedisBackend, "mark_as_failure", refuse)
        assert not answer(one, client)
    assert one._answer_all(client.backend, KEYS)
    assert client.AsyncResult("b").state == "FAILURE"


def test_a_record_that_cannot_be_read_is_dropped(
    client: Celery, lose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    lose("a")
    client.backend.client.hset(KEYS.records(LOST), "9", b"garbage")
    assert answer(other(client), client)
    assert "cannot be read and is dropped" in caplog.text
    assert client.AsyncResult("a").state == "FAILURE"


def test_an_ignored_result_is_not_stored(client: Celery, lose: Callable[..., None]) -> None:
    lose("a", ignore_result=True)
    assert answer(other(client), client)
    assert client.AsyncResult("a").state == "PENDING"


def test_a_worker_that_shows_itself_is_not_struck_off(client: Celery) -> None:
    one, two = other(client, "one@test"), other(client, "two@test")
    redis = client.backend.client
    one._round(client.backend, KEYS)
    two._take_over(redis, KEYS, one.worker)
    assert redis.sismember(KEYS.workers, one.worker)
    one._leave(client.backend, KEYS)
    assert not redis.sismember(KEYS.workers, one.worker)


def test_there_is_no_janitor_without_redis_or_where_it_is_switched_off(client: Celery) -> None:
    assert lost_workers.of(client, conf.Settings(worker_ttl=None), "w@h") is None
    assert lost_workers.of(client, conf.Settings(), "w@h") is not None
    with Celery("files", backend="cache+memory://", set_as_current=False) as app:
        app.conf.result_backend = "cache+memory://"
        app.backend_cls = "cache+memory://"
        assert lost_workers.of(app, conf.Settings(), "w@h") is None
