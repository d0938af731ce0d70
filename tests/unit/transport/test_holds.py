"""What Redis keeps of messages that a worker has taken, and how they go back to their queues."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue

from tests.processes import eventually
from tests.redis_readers import (
    asking_again,
    described,
    foreign,
    held,
    holds_key,
    new_holds,
    reading,
    reclaim,
    send,
    stock,
    tags,
    take_with_kombu,
)

# What is held


def test_what_a_killed_worker_held_goes_back_as_it_was(server: redis.Redis, redis_url: str) -> None:
    for number in range(12):
        send(
            redis_url,
            [number],
            priority=3 * (number % 3),
            headers={"id": f"é {number}", "deep": {"list": [1, None, True], "empty": []}},
            correlation_id=f"c{number}",
        )
    with reading(redis_url) as reader:
        taken = [described(message) for message in reader.read(12)]
        assert held(server) == tags(reader)
        assert not server.exists("unacked", "unacked_index"), "stock workers would return them"
        # As if this process had been killed: the others find only what Redis knows.
        assert reclaim(server, reader) == 12
        assert held(server) == set()
        found = take_with_kombu(redis_url)
        assert [described(message) for message in found] == taken, "in the order of before"
        assert all(message.headers["redelivered"] for message in found)
        assert all(message.delivery_info["redelivered"] for message in found)


def test_a_delivery_counts_if_its_worker_was_lost(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, [1])
    for _ in range(3):
        with reading(redis_url) as reader:
            reader.read(1)
            assert reclaim(server, reader) == 1
    with reading(redis_url) as reader:
        (message,) = reader.read(1)
        assert message.headers["gw-deliveries"] == 3
        message.requeue()
        reader.read(2)
        assert reader.messages[1].headers["gw-deliveries"] == 3, "no worker was lost"


def test_a_name_belongs_to_one_delivery(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, [1])
    with reading(redis_url) as frozen, reading(redis_url) as other:
        frozen.read(1)
        reclaim(server, frozen)
        other.read(1)
        frozen.messages[0].ack()
        frozen.turn()
        assert held(server) == tags(other), "what wakes up late acknowledges nothing of others"
        assert tags(other).isdisjoint(tags(frozen))
        assert reclaim(server, frozen) == 0


def test_what_came_through_an_exchange_goes_back_to_the_queue_it_was_in(
    server: redis.Redis, redis_url: str
) -> None:
    exchange = Exchange("news", type="topic")
    both = [Queue("all", exchange, "#"), Queue("sport", exchange, "sport.*")]
    with reading(redis_url, *both[:1]) as reader:
        with Connection(redis_url) as connection:
            for number in range(5):
                connection.Producer(serializer="json").publish(
                    {"n": number}, exchange=exchange, routing_key="sport.chess", declare=both
                )
        taken = reader.read(5)
        assert {message.delivery_info["exchange"] for message in taken} == {"news"}
        assert reclaim(server, reader) == 5
        assert (server.llen("all"), server.llen("sport")) == (5, 5)


def test_what_is_not_read_any_more_is_held_and_comes_again(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(30))
    worker = new_holds()
    with reading(redis_url, held_by=worker) as reader:
        reader.read(1)
        worker.in_use = lambda: [reader.messages[0].delivery_tag]  # it runs
        reader.ask()
        eventually(lambda: server.llen("q") == 0)
        # The connection breaks before the answer is read.
        reader.channel.client.connection.disconnect()
        assert len(held(server)) == 30
        with reading(redis_url, held_by=worker) as again:
            again.read(29)
            assert again.numbers() == list(range(1, 30))
            assert held(server) == tags(reader) | tags(again)


def test_a_huge_message_is_taken_and_given_back(server: redis.Redis, redis_url: str) -> None:
    huge = "é" * 2_500_000
    send(redis_url, ["small", huge, "small"])
    with reading(redis_url) as reader:
        reader.read(3)
        assert reader.numbers() == ["small", huge, "small"]
        assert held(server) == tags(reader)
        assert reclaim(server, reader) == 3
        (found,) = (large for large in take_with_kombu(redis_url) if len(large.body) > 1000)
        assert json.loads(found.body)["n"] == huge


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" , ", " : ")])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"headers": {"x": {"delivery_tag": "fake"}}},
        {"headers": {"long": "x" * 9000}},
        {"properties": {"delivery_info": {"routing_key": "q"}, "body_encoding": "utf-8"}},
        {"properties": {"delivery_tag": {}, "body_encoding": "utf-8"}},
    ],
)
def test_messages_of_other_clients_are_freed_when_they_are_acknowledged(
    server: redis.Redis, redis_url: str, changes: dict[str, Any], separators: tuple[str, str]
) -> None:
    send(redis_url, range(3))
    server.lpush("q", json.dumps(foreign(**changes), separators=separators))
    with reading(redis_url) as reader:
        reader.read(4)
        assert reader.numbers() == [0, 1, 2, "foreign"]
        assert held(server) == tags(reader)
        for message in reader.messages:
            message.ack()
        assert held(server) == set()


@pytest.mark.parametrize("left_out", ["headers", "properties"])
def test_a_held_message_that_cannot_be_counted_goes_back_as_it_was(
    server: redis.Redis, redis_url: str, left_out: str
) -> None:
    message = foreign()
    del message[left_out]
    with reading(redis_url) as reader:
        record = b"q\n" + json.dumps(message).encode()
        server.hset(holds_key(reader), "7", record)
        assert reclaim(server, reader) == 1
        assert server.lrange("q", 0, -1) == [json.dumps(message).encode()]


# What is no message


def _with_properties(properties: Any) -> str:
    return json.dumps({"body": "e30=", "properties": properties})


BROKEN = {
    "text": "this is no JSON",
    "empty": "",
    "truncated": '{"body": "x", "properties": {"delivery_tag": "poison"}',
    "not text": b'{"body": \xff\xfe, "properties": {"delivery_tag": "poison"}}',
    "list": "[1, 2]",
    "number": "7",
    "nested": '{"a":' * 3000 + "1" + "}" * 3000,
    "no properties": '{"body": "e30="}',
    "properties are null": _with_properties(None),
    "properties are a number": _with_properties(5),
    "properties are a text": _with_properties("x"),
    "properties are a list": _with_properties([1]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_message_costs_no_other_its_turn(
    server: redis.Redis, redis_url: str, broken: str | bytes
) -> None:
    send(redis_url, range(3))
    server.lpush("q", broken)
    send(redis_url, range(3, 8))
    with reading(redis_url) as reader:
        reader.read_all()
        assert reader.numbers() == list(range(8))
        for message in reader.messages:
            message.ack()
        assert server.llen("q") == 0
        # What stays held would come again, for ever.
        eventually(lambda: reader.turn() or not held(server), 5, 0)


def test_a_callback_that_fails_costs_no_other_message_its_turn(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    worker = new_holds()
    with reading(redis_url, held_by=worker) as reader:

        def take(message: Any) -> None:
            reader.messages.append(message)
            if len(reader.messages) == 3:
                raise ConnectionError("the broker is away")

        reader.consumer.on_message = take
        with pytest.raises(ConnectionError, match="the broker is away"):
            reader.read(10)
        assert held(server) == tags(reader)
        assert server.llen("q") == 7
    with reading(redis_url, held_by=worker) as again:
        again.read(10)
        assert again.numbers() == list(range(10)), "Celery forgot the three with the connection"
        assert held(server) == tags(again)


# What others have written in the place of holds

WRONG = {
    "string": lambda client, key: client.set(key, "x"),
    "list": lambda client, key: client.rpush(key, "x"),
    "zset": lambda client, key: client.zadd(key, {"x": 1}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_holds_whose_key_has_another_type_are_replaced_and_the_queues_are_served(
    server: redis.Redis, redis_url: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    send(redis_url, range(5))
    with asking_again(0.05), reading(redis_url) as reader:
        reader.read(5)
        server.delete(holds_key(reader))
        WRONG[kind](server, holds_key(reader))
        for message in reader.messages[:3]:
            message.ack()
        send(redis_url, range(5, 30))
        reader.read(30)
        assert reader.numbers() == list(range(30))
        assert held(server) == {message.delivery_tag for message in reader.messages[5:]}
        assert reader.holds.outage == ""
    (line,) = [line for line in caplog.messages if "it is deleted" in line]
    assert line.startswith(f"the key {holds_key(reader)} in Redis was a {kind}, ")


def test_holds_of_an_earlier_incarnation_are_replaced_too(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(5))
    with asking_again(0.05), reading(redis_url) as reader:
        (message, *_) = reader.read(1)
        before = holds_key(reader)
        reader.holds.begin_anew()
        server.delete(before)
        server.set(before, "x")
        message.ack()
        reader.read(5)
        eventually(lambda: reader.turn() or not server.exists(before), 5, 0)
        assert reader.numbers() == list(range(5))


@pytest.mark.parametrize("kind", WRONG)
def test_lost_holds_whose_key_has_another_type_are_removed(
    server: redis.Redis, redis_url: str, kind: str
) -> None:
    with reading(redis_url) as reader:
        WRONG[kind](server, holds_key(reader))
        assert reclaim(server, reader) == 0
        assert not server.exists(holds_key(reader))


FIELDS = {
    "a name": ("name", b"q\n{}"),
    "not text": (b"\xff\xfe", b"q\n{}"),
    "a huge number": ("9" * 5000, b"q\n{}"),
    "a sign": ("-1", b"q\n{}"),
    "no queue": ("77", b"{}"),
    "nothing": ("77", b""),
}


@pytest.mark.parametrize(("field", "value"), FIELDS.values(), ids=FIELDS)
def test_a_field_that_is_no_hold_is_removed_and_the_others_go_back(
    server: redis.Redis,
    redis_url: str,
    field: str | bytes,
    value: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(redis_url, range(5))
    with reading(redis_url) as reader:
        reader.read(5)
        server.hset(holds_key(reader), field, value)
        assert reclaim(server, reader) == 5
        assert server.llen("q") == 5
        assert not server.exists(holds_key(reader))
        keys: Any = server.keys("*")
        assert set(keys) - {b"gw:check"} == {b"q"}, "no list is made"
    assert caplog.text.count("holds no message: it is deleted") == 1


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_message_whose_queue_is_no_list_any_more_waits_and_the_others_go_back(
    server: redis.Redis, redis_url: str, is_lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    send(redis_url, range(3), "bad")
    send(redis_url, range(3), "good")
    with reading(redis_url, "bad", "good") as reader:
        reader.read(6)
        server.set("bad", "x")
        if is_lost:
            with pytest.raises(redis.ResponseError, match=r"^bad is not a list, messages wait"):
                reclaim(server, reader)
        else:
            for message in list(reader.messages):
                message.requeue()
            assert "messages cannot be given back: bad is not a list" in caplog.text
        assert server.llen("good") == 3
        assert len(held(server)) == 3
        server.delete("bad")
        assert reclaim(server, reader) == 3
        assert server.llen("bad") == 3


# Messages that stock workers have left


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_what_stock_workers_hold_comes_back_by_the_clock_of_redis(
    jump: int, server: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(redis_url, [0, 1])
    with (
        stock(redis_url) as channel,
        reading(redis_url, "other", transport_options={"visibility_timeout": 3000}) as reader,
    ):
        for _ in range(2):
            channel.basic_consume("q", no_ack=False, callback=print, consumer_tag="t")
            message = channel.basic_get("q")
            channel.qos.append(message, message.delivery_tag)
        true = time.time
        monkeypatch.setattr(time, "time", lambda: true() + jump)
        reader.channel.qos.restore_visible(num=None, interval=1)
        assert server.hlen("unacked") == 2
        reader.channel.qos.visibility_timeout = -60.0
        reader.channel.qos.restore_visible(num=1, interval=1)
        assert (server.hlen("unacked"), server.llen("q")) == (1, 1)
