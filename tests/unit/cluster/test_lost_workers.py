"""What a lost worker held goes back to its queues, on a real Redis."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.testing import Server, eventually
from tests import outages
from tests.cluster_harness import Answerer, Project, hold, leave_record, pages_of

TTL = 15
LOST = "lost@h:1.0"
HOLDS = f"gw:hold:{LOST}"


@pytest.fixture
def client(gw_broker: Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(gw_broker.socket)) as client:
        yield client


@pytest.fixture
def app(gw_broker: Server) -> Iterator[Celery]:
    urls = {"broker": gw_broker.broker_url, "backend": gw_broker.result_url}
    with Celery("cluster", set_as_current=False, **urls) as app:
        yield app


def send(app: Celery, *ids: str, **options: Any) -> None:
    for task_id in ids:
        app.send_task("unit.task", (task_id,), task_id=task_id, **options)


def waiting(client: redis.Redis, key: str = "celery") -> list[Any]:
    """The messages of a list, the one that is taken next first."""
    listed: Any = client.lrange(key, 0, -1)
    return [json.loads(message) for message in reversed(listed)]


def ids(client: redis.Redis, key: str = "celery") -> list[str]:
    return [message["headers"]["id"] for message in waiting(client, key)]


def test_what_was_held_is_taken_next_in_its_order_and_says_so(
    app: Celery, client: redis.Redis
) -> None:
    send(app, "a", "b", "c", "d")
    hold(client, LOST, 3)
    assert ids(client) == ["d"]
    assert Answerer(app, "living@h:1").answer(LOST)
    assert ids(client) == ["a", "b", "c", "d"]
    again, _, _, untouched = waiting(client)
    assert again["headers"]["gw-deliveries"] == 1
    assert again["headers"]["redelivered"] is True
    assert again["properties"]["delivery_info"]["redelivered"] is True
    assert "gw-deliveries" not in untouched["headers"]
    assert not client.exists(HOLDS)
    hold(client, "next@h:1.0", 1)
    assert Answerer(app, "living@h:1").answer("next@h:1.0")
    assert waiting(client)[0]["headers"]["gw-deliveries"] == 2


def test_an_urgent_message_goes_back_to_the_list_of_its_priority(
    app: Celery, client: redis.Redis
) -> None:
    send(app, "urgent", priority=0)
    send(app, "later", priority=3)
    hold(client, LOST, 2)
    assert Answerer(app, "living@h:1").answer(LOST)
    assert ids(client) == ["urgent"]
    assert ids(client, "celery\x06\x163") == ["later"]


@pytest.mark.parametrize("message", [b"garbage", b"\xff\x00", b"[]", b"{}", b'{"headers": null}'])
def test_what_is_no_message_goes_back_unchanged(
    app: Celery, client: redis.Redis, message: bytes
) -> None:
    client.lpush("celery", message)
    hold(client, LOST, 1)
    assert Answerer(app, "living@h:1").answer(LOST)
    assert client.lrange("celery", 0, -1) == [message]


def test_many_at_once_give_each_message_back_once(app: Celery, client: redis.Redis) -> None:
    names = [f"t{number}" for number in range(200)]
    send(app, *names)
    hold(client, LOST, 200)
    others = [
        threading.Thread(target=Answerer(app, f"w{number}@h:1").answer, args=(LOST,))
        for number in range(4)
    ]
    with pages_of(7):
        for one in others:
            one.start()
        for one in others:
            one.join(30)
    assert sorted(ids(client)) == sorted(names)


def test_what_one_that_is_killed_half_way_left_is_given_back_by_the_next(
    app: Celery, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"t{number}" for number in range(20)]
    send(app, *names)
    hold(client, LOST, 20)
    execute, pages = redis.client.Pipeline.execute, []

    def execute_twice(pipe: Any, **options: Any) -> Any:
        if len(pages) == 2:
            raise ConnectionError("killed")
        pages.append(pipe)
        return execute(pipe, **options)

    with pages_of(3):
        with monkeypatch.context() as patch:
            patch.setattr(redis.client.Pipeline, "execute", execute_twice)
            with pytest.raises(ConnectionError, match="killed"):
                Answerer(app, "killed@h:1").answer(LOST)
        assert client.hlen(HOLDS) == 14
        assert Answerer(app, "living@h:1").answer(LOST)
    assert ids(client) == names


def test_a_queue_that_is_no_list_holds_up_no_other(app: Celery, client: redis.Redis) -> None:
    send(app, "a", queue="odd")
    send(app, "b")
    hold(client, LOST, 1, "odd")
    hold(client, LOST, 1, first=2)
    hold(client, "second@h:1.0", 1)
    client.set("odd", "text")
    living = Answerer(app, "living@h:1")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        living.answer(LOST, "second@h:1.0")
    assert living.tries_again
    assert ids(client) == ["b"]
    assert living.done == ["second@h:1.0"]
    assert client.hkeys(HOLDS) == [b"1"], "it is not lost"
    client.delete("odd")
    assert living.answer(LOST)
    assert ids(client, "odd") == ["a"]


def test_a_lost_worker_takes_nothing_more(app: Celery, client: redis.Redis) -> None:
    send(app, "a")
    client.set(f"gw:dead:{LOST}", "living@h:1.0")
    with pytest.raises(redis.ResponseError, match="GWDEAD declared lost"):
        hold(client, LOST, 1)
    assert ids(client) == ["a"]
    assert not client.exists(HOLDS)


@pytest.mark.parametrize("kind", ["READONLY", "OOM"])
def test_nothing_runs_again_before_the_results_refuse_what_the_lost_worker_stores(
    app: Celery, client: redis.Redis, tmp_path: Any, kind: str
) -> None:
    with outages.outage(tmp_path / "results") as server:
        app.backend_cls = server.server.result_url
        send(app, "a")
        hold(client, LOST, 1)
        living = Answerer(app, "living@h:1")
        with outages.refusing(server.server.socket, kind):
            with pytest.raises(redis.ResponseError):
                living.answer(LOST)
            assert living.tries_again
            assert ids(client) == []
        assert living.answer(LOST)
        assert ids(client) == ["a"]
        assert 6 * 86_400 < app.backend.client.ttl(f"gw:dead:{LOST}") <= 7 * 86_400


def test_keys_begin_with_the_prefix_of_the_broker(app: Celery, client: redis.Redis) -> None:
    app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    client.hset(f"shop:gw:hold:{LOST}", "1", b"shop:celery\n{}")
    assert Answerer(app, "living@h:1").answer(LOST)
    assert client.lrange("shop:celery", 0, -1) == [b"{}"]


# -- with its heartbeats --


def test_held_messages_and_early_acknowledged_inputs_follow_the_same_rule(
    app: Celery, client: redis.Redis
) -> None:
    with Project(app, client).running() as project:
        for name in ("a@h", "b@h", "c@h"):
            project.add(name)
        project.after(TTL + 5)
        killed = project.workers.pop("b@h")
        send(app, "held")
        hold(client, killed.incarnation, 1)
        leave_record(app, killed.start, 2, "early")
        app.backend.store_result("early", None, "STARTED")
        project.after(TTL - 1)
        assert ids(client) == []
        assert app.backend.get_state("early") == "STARTED"
        project.after(2)
        eventually(lambda: ids(client) == ["held"])
        eventually(lambda: app.backend.get_state("early") == "FAILURE")
        project.after(2)
        assert killed.incarnation not in project.alive()


def test_a_worker_that_ends_gives_back_what_it_has_not_finished(
    app: Celery, client: redis.Redis
) -> None:
    with Project(app, client).running() as project:
        one = project.add("a@h")
        project.after(2)
        send(app, "done", "undone", "unbegun")
        hold(client, one.incarnation, 3)
        one.acknowledge(1)
        project.workers.pop("a@h").leave()
        assert ids(client) == ["undone", "unbegun"]
        assert all("gw-deliveries" not in each["headers"] for each in waiting(client))
        with pytest.raises(redis.ResponseError, match="GWDEAD"):
            hold(client, one.incarnation, 1)  # its last command, which comes late
