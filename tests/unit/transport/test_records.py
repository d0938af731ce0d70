"""Our Redis transport beside kombu's: what one takes, the other gives back."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue

from tests.processes import eventually
from tests.redis_readers import (
    described,
    foreign,
    reading,
    send,
    stock,
    tags,
    take_with_kombu,
    unacknowledged,
)

# What is recorded


def test_kombu_gives_back_what_was_taken(server: redis.Redis, redis_url: str) -> None:
    for number in range(12):
        send(
            redis_url,
            [number],
            priority=3 * (number % 3),
            headers={"id": f"é {number}", "deep": {"list": [1, None, True]}},
            correlation_id=f"c{number}",
        )
    with reading(redis_url) as reader:
        taken = {message.delivery_tag: described(message) for message in reader.read(12)}
        assert unacknowledged(server) == set(taken)
        # As if this process had been killed: kombu finds only what Redis knows.
        found = take_with_kombu(redis_url)
        assert {message.delivery_tag: described(message) for message in found} == taken
        assert all(message.headers["redelivered"] for message in found)
        assert not server.exists("unacked", "unacked_index")


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
        tag = taken[-1].delivery_tag
        with stock(redis_url) as channel:
            channel.qos.restore_by_tag(tag)
        assert (server.llen("all"), server.llen("sport")) == (1, 5)


def scores(server: redis.Redis) -> list[float]:
    return [score for _, score in server.zrange("unacked_index", 0, -1, withscores=True)]


@pytest.mark.parametrize("refused", ["", "-script"])
@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_jumps_gives_nothing_back_and_records_the_time_of_redis(
    refused: str, jump: int, server: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        server.acl_setuser("default", enabled=True, commands=[refused])
    with reading(redis_url, transport_options={"visibility_timeout": 3000}) as reader:
        send(redis_url, [0])
        reader.read(1)
        true = time.time
        monkeypatch.setattr(time, "time", lambda: true() + jump)
        send(redis_url, [1])
        reader.read(2)
        reader.channel.qos.restore_visible(num=None)
        assert unacknowledged(server) == tags(reader)
        assert all(abs(score - true()) < 60 for score in scores(server))
        reader.channel.qos.visibility_timeout = -60.0
        reader.channel.qos.restore_visible(num=1, interval=1)
        assert len(unacknowledged(server)) == 1


def test_where_redis_does_not_tell_the_time_this_machine_does(
    server: redis.Redis, redis_url: str
) -> None:
    server.acl_setuser("default", enabled=True, commands=["-time"])
    with reading(redis_url) as reader:
        send(redis_url, [0, 1])
        reader.read(2)
        assert unacknowledged(server) == tags(reader)
        assert all(abs(score - time.time()) < 60 for score in scores(server))


def test_what_is_not_read_any_more_is_recorded(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(30))
    with reading(redis_url) as reader:
        reader.read(1)
        reader.ask()
        eventually(lambda: server.llen("q") == 0)
        # The process is killed before it reads the answer.
        reader.channel.client.connection.disconnect()
        assert len(unacknowledged(server)) == 30
        found = take_with_kombu(redis_url)
        assert sorted(json.loads(message.body)["n"] for message in found) == list(range(30))


def test_a_huge_message_is_taken_and_given_back(server: redis.Redis, redis_url: str) -> None:
    huge = "é" * 2_500_000
    send(redis_url, ["small", huge, "small"])
    with reading(redis_url) as reader:
        reader.read(3)
        assert reader.numbers() == ["small", huge, "small"]
        assert unacknowledged(server) == tags(reader)
        (found,) = (large for large in take_with_kombu(redis_url) if len(large.body) > 1000)
        assert json.loads(found.body)["n"] == huge


FAKES = [
    '"delivery_tag": "fake"',
    'x", "delivery_tag": "fake',
    '\\", "delivery_tag": "fake"}',
    '{"properties": {"delivery_tag": "fake"}}',
]


@pytest.mark.parametrize("fake", FAKES)
def test_a_text_that_looks_like_a_tag_is_none(
    server: redis.Redis, redis_url: str, fake: str
) -> None:
    told = {
        "correlation_id": fake,
        "headers": {"note": fake, fake: 1, "delivery_tag": "fake", "properties": json.loads("{}")},
        "app_id": fake,
        "reply_to": fake,
    }
    send(redis_url, [fake] * 5, **told)
    with reading(redis_url) as reader:
        reader.read(5)
        assert unacknowledged(server) == tags(reader)
        for message in reader.messages:
            message.ack()
        assert not server.exists("unacked", "unacked_index")


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" , ", " : ")])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"headers": {"x": {"delivery_tag": "fake"}}},
        {"headers": {"long": "x" * 9000}},
        {"headers": {"long": "x" * 9000, "delivery_tag": "fake"}},
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
        assert unacknowledged(server) == tags(reader)
        for message in reader.messages:
            message.ack()
        assert not server.exists("unacked", "unacked_index")


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
    "no tag": _with_properties({}),
    "tag is null": _with_properties({"delivery_tag": None}),
    "tag is true": _with_properties({"delivery_tag": True}),
    "tag is an object": _with_properties({"delivery_tag": {}}),
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
        # What stays here is read, an hour later, by every worker that starts.
        assert take_with_kombu(redis_url) == []
        assert not server.exists("unacked", "unacked_index")


def test_a_callback_that_fails_costs_no_other_message_its_turn(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    with reading(redis_url) as reader:

        def take(message: Any) -> None:
            reader.messages.append(message)
            if len(reader.messages) == 3:
                raise ConnectionError("the broker is away")

        reader.consumer.on_message = take
        with pytest.raises(ConnectionError, match="the broker is away"):
            reader.read(10)
        reader.connection.close()
    assert server.llen("q") == 10
    assert not server.exists("unacked", "unacked_index")
