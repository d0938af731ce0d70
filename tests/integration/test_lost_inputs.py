"""Workers that answer for what a lost one left, side by side, over a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.backends.redis import RedisBackend
from celery.exceptions import WorkerLostError

from gw_celery.cluster import early_acks, lost_inputs, membership
from tests import pooling

pytestmark = pytest.mark.integration

LOST = "lost@test:1"
INCARNATION = f"{LOST}.0"
RECORDS = f"gw:early:{LOST}"


@pytest.fixture
def client(redis_url: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(redis_url, result_url) as app:
        yield app


@pytest.fixture
def lose(client: Celery) -> Callable[..., None]:
    """Leave records of a worker that is gone."""

    def leave(*ids: str, **entries: Any) -> None:
        redis = client.backend.client
        for number, task_id in enumerate(ids):
            record = early_acks.write({"id": task_id, "task": "proj.embed", **entries}, None)
            redis.hset(RECORDS, str(number), record)

    return leave


def other(client: Celery, start: str = "living@test:1") -> lost_inputs.LostInputs:
    return lost_inputs.LostInputs(client, start)


def answer(one: lost_inputs.LostInputs, lost: str = INCARNATION) -> bool:
    """Have a worker answer for a lost one, in this thread; whether nothing is left."""
    one._lost.setdefault(lost, False)
    one.run_round()
    return list(one.answered) == [lost]


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
    victim._take_over(client.backend, INCARNATION)
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
        assert one.period < 60.0
    assert client.AsyncResult("b").state == "FAILURE"
    assert client.AsyncResult("a").state == "PENDING"
    assert answer(one)
    assert client.AsyncResult("a").state == "FAILURE"


def test_a_record_that_cannot_be_read_is_dropped(
    client: Celery, lose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    lose("a")
    client.backend.client.hset(RECORDS, "9", b"garbage")
    assert answer(other(client))
    assert "cannot be read and is dropped" in caplog.text
    assert client.AsyncResult("a").state == "FAILURE"


def test_an_ignored_result_is_not_stored(client: Celery, lose: Callable[..., None]) -> None:
    lose("a", ignore_result=True)
    assert answer(other(client))
    assert client.AsyncResult("a").state == "PENDING"


def test_what_its_replicas_left_is_removed_also_at_the_end(client: Celery) -> None:
    one, key = other(client), "gw:early:living@test:1"
    client.backend.client.hset(key, mapping={"1": "a", "2": "b", "3": "c"})
    one.forget([1, 3])
    assert one.close()
    assert client.backend.client.hkeys(key) == [b"2"]
    assert one.has_own()


def test_a_worker_that_stops_while_inputs_of_it_are_on_record_will_be_answered_for(
    client: Celery,
) -> None:
    one = membership.Membership(client, "one@test", {}, {}, 15.0)
    broker = one._shared
    assert broker is not None
    one.run_round()
    client.backend.client.hset(f"gw:early:{one.start_id}", "1", "a")
    one.leave()
    assert broker.client().zrange("gw:alive", 0, -1) == [one.incarnation.encode()]
    assert not broker.client().exists("gw:records")
    client.backend.client.delete(f"gw:early:{one.start_id}")
    one.leave()
    assert not broker.client().exists("gw:alive")
    broker.close()


def test_no_worker_answers_without_redis_or_where_none_is_declared_lost(client: Celery) -> None:
    assert membership.Membership(client, "w@h", {}, {}, None).lost is None
    assert lost_inputs.of(client, "w@h:1") is not None
    with Celery("files", backend="cache+memory://", set_as_current=False) as app:
        app.conf.result_backend = "cache+memory://"
        app.backend_cls = "cache+memory://"
        assert lost_inputs.of(app, "w@h:1") is None
