"""Which messages our Redis transport takes, how many, and when the server refuses to give them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import redis
from kombu import Connection

from gw_celery import testing
from tests import outages
from tests.processes import eventually
from tests.redis_readers import (
    asking_again,
    calls,
    held,
    reading,
    reclaim,
    send,
    tags,
    take_with_kombu,
    tombstone,
)

# What is taken, in which order


def test_messages_are_taken_in_order_and_many_at_a_time(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(100))
    with reading(redis_url) as reader:
        read = [0]
        while reader.turn():
            read.append(len(reader.messages))
        assert reader.numbers() == list(range(100))
    steps = [after - before for before, after in pairwise(read)]
    assert steps[0] == 1, "it does not wait for more"
    assert 16 <= max(steps[1:]) == steps[1] < 100, "nor does it keep the server for long"


def test_urgent_messages_come_first(server: redis.Redis, redis_url: str) -> None:
    for priority in (9, 0, 6, 3, 0, 9):
        send(redis_url, [priority], priority=priority)
    with reading(redis_url) as reader:
        reader.read(6)
        assert reader.numbers() == [0, 0, 3, 6, 9, 9]


def test_an_urgent_message_of_any_queue_comes_before_the_others(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, ["a"] * 10, "a", priority=6)
    send(redis_url, ["b"] * 10, "b", priority=3)
    with reading(redis_url, "a", "b") as reader:
        reader.read(20)
        assert reader.numbers() == ["b"] * 10 + ["a"] * 10


@pytest.mark.parametrize("prefetch", [0, 4])
def test_queues_of_one_priority_take_turns(
    server: redis.Redis, redis_url: str, prefetch: int
) -> None:
    for name in "abc":
        send(redis_url, [name] * 20, name)
    with reading(redis_url, *"abc", prefetch=prefetch) as reader:
        while len(reader.messages) < 30:
            seen = len(reader.messages)
            reader.read(seen + 1)
            for message in reader.messages[seen:]:
                message.ack()
        first = reader.numbers()[:30]
        assert {name: first.count(name) for name in "abc"} == {"a": 10, "b": 10, "c": 10}


def test_a_strategy_that_empties_queue_after_queue_is_followed(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, ["low"] * 20, "low")
    send(redis_url, ["high"] * 20, "high")
    # The strategy "priority" has no order at all in kombu 5.6.
    options = {"queue_order_strategy": "sorted"}
    with reading(redis_url, "high", "low", transport_options=options) as reader:
        reader.read(40)
        assert reader.numbers() == ["high"] * 20 + ["low"] * 20


def test_queue_names_of_any_characters_are_read(server: redis.Redis, redis_url: str) -> None:
    names = ["gpu.A100", 'a"b\\c', "größe/日本", "with space"]
    for name in names:
        send(redis_url, [name] * 3, name)
    with reading(redis_url, *names) as reader:
        reader.read(12)
        assert sorted(reader.numbers()) == sorted(names * 3)
        assert reclaim(server, reader) == 12
    assert {name: len(take_with_kombu(redis_url, name)) for name in names} == dict.fromkeys(
        names, 3
    )


def test_a_prefix_of_all_keys_is_kept_to(server: redis.Redis, redis_url: str) -> None:
    options = {"global_keyprefix": "mine:"}
    send(redis_url, ["of others"] * 10)
    with Connection(redis_url, transport_options=options) as connection:
        for number in range(10):
            connection.Producer(serializer="json").publish({"n": number}, routing_key="q")
    with reading(redis_url, transport_options=options) as reader:
        reader.read_all()
        assert reader.numbers() == list(range(10))
        assert held(server, "mine:") == tags(reader)
        for message in reader.messages[:4]:
            message.ack()
        assert len(held(server, "mine:")) == 6
        reader.messages[9].requeue()
        assert server.llen("mine:q") == 1
    assert server.llen("q") == 10
    keys: Any = server.keys("*gw:*")
    assert keys
    assert all(key.startswith(b"mine:") for key in keys)


# How many


def test_no_more_is_taken_than_the_prefetch_count(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(50))
    with reading(redis_url, prefetch=5) as reader:
        reader.read_all()
        assert (len(reader.messages), len(held(server))) == (5, 5)
        assert server.llen("q") == 45
        for message in reader.messages[:2]:
            message.ack()
        reader.read_all()
        assert (len(reader.messages), len(held(server))) == (7, 5)


def test_a_prefetch_count_that_grows_and_shrinks_is_followed(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(50))
    with reading(redis_url, prefetch=2) as reader:
        reader.read_all()
        reader.consumer.qos(prefetch_count=12)
        reader.read_all()
        assert len(held(server)) == 12
        reader.consumer.qos(prefetch_count=3)
        for message in reader.messages[:10]:
            message.ack()
        reader.read_all()
        assert len(held(server)) == 3


def test_celery_s_switch_against_prefetching_is_obeyed(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(20))
    with reading(redis_url, prefetch=16) as reader:
        # Celery's worker_disable_prefetch replaces the method of this one object.
        reader.channel.qos.can_consume = lambda: len(reader.messages) < 3
        reader.read_all()
        assert len(held(server)) == 3
        assert server.llen("q") == 17


# Servers that refuse


def test_a_server_that_forgot_the_script_gets_it_again(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(10))
    with reading(redis_url, prefetch=5) as reader:
        reader.read(5)
        server.script_flush()
        reader.consumer.qos(prefetch_count=100)
        reader.read(10)
        send(redis_url, range(10, 30))
        pops = calls(server, "rpop")
        reader.read(30)
        assert reader.numbers() == list(range(30))
        assert calls(server, "rpop") > pops


def test_a_full_server_loses_nothing(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(20))
    with reading(redis_url) as reader:
        reader.read(1)
        server.config_set("maxmemory", 1)
        reader.ask()
        eventually(lambda: (reader.turn() and False) or len(reader.messages) == 20, 5, 0)
        assert held(server) == tags(reader)
        reader.messages[0].ack()
        assert len(held(server)) == 19


@pytest.mark.parametrize("kind", ["READONLY", "NOPERM", "BUSY"])
def test_a_server_that_refuses_pauses_the_consumer_and_loses_nothing(
    server: redis.Redis,
    redis_server: testing.Server,
    redis_url: str,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(redis_url, range(20))
    with asking_again(0.05), reading(redis_url) as reader:
        reader.read(1)
        with outages.refusing(redis_server.socket, kind):
            reader.ask()
            # An answer that was on its way may still come.
            eventually(lambda: (reader.turn() and False) or reader.holds.outage, 5, 0)
            reader.messages[0].ack()
            taken = len(reader.read_all())
        reader.read(20)
        assert reader.numbers() == list(range(20))
        assert reader.holds.outage == ""
        eventually(
            lambda: (
                reader.turn() or held(server) == tags(reader) - {reader.messages[0].delivery_tag}
            ),
            5,
            0,
        )
    logged = [line for line in caplog.messages if line.startswith("Redis refuses to give messages")]
    assert len(logged) == 1
    assert taken < 20


@pytest.mark.parametrize("refused", ["-@scripting", "-evalsha", "-script", "-rpop", "-hset"])
def test_a_user_without_a_command_that_takes_messages_gets_none_until_it_is_allowed(
    server: redis.Redis, redis_url: str, refused: str
) -> None:
    send(redis_url, range(20))
    with asking_again(0.05), reading(redis_url) as reader:
        reader.read(1)
        server.execute_command("ACL", "SETUSER", "default", refused)
        reader.read_all()
        assert server.llen("q") == 19
        assert "no permissions" in reader.holds.outage or "can't run" in reader.holds.outage
        server.execute_command("ACL", "SETUSER", "default", "+@all")
        reader.read(20)
        assert reader.numbers() == list(range(20))
        assert held(server) == tags(reader)


def test_a_worker_that_was_declared_lost_takes_nothing(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(20))
    with asking_again(0.05), reading(redis_url) as reader:
        reader.read(1)
        server.set(tombstone(reader), "another")
        reader.read_all()
        assert server.llen("q") == 19
        assert reader.holds.outage == "", "its heartbeats learn of it, and say so"
        reader.holds.begin_anew()
        reader.read(20)
        assert len({tag.rpartition("/")[0] for tag in tags(reader)}) == 2


def test_a_worker_without_heartbeats_takes_nothing(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(20))
    with reading(redis_url) as reader:
        reader.read(1)
        reader.holds.fresh_until = 0.0
        reader.read_all()
        assert server.llen("q") == 19
        assert "no heartbeat has reached Redis" in reader.holds.outage
        reader.holds.fresh_until = math.inf
        reader.read(20)
        assert reader.numbers() == list(range(20))


# Keys that are no lists

WRONG = {
    "set": lambda client, key: client.sadd(key, "x"),
    "hash": lambda client, key: client.hset(key, "x", "y"),
    "string": lambda client, key: client.set(key, "x"),
    "stream": lambda client, key: client.xadd(key, {"x": "y"}),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("priority", [0, 3])
def test_a_queue_whose_key_is_no_list_is_reported_once_and_the_others_are_served(
    server: redis.Redis,
    redis_url: str,
    kind: str,
    priority: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    WRONG[kind](server, f"bad\x06\x16{priority}" if priority else "bad")
    send(redis_url, range(50), "good")
    with asking_again(0.05), reading(redis_url, "bad", "good") as reader:
        reader.read(50)
        assert reader.numbers() == list(range(50))
        assert held(server) == tags(reader)
        server.delete("bad", "bad\x06\x163")
        send(redis_url, ["mended"], "bad")
        reader.read(51)
    (line,) = [line for line in caplog.messages if "cannot be read" in line]
    assert line.startswith("the queue bad cannot be read: the key bad")
    assert f" in Redis is a {kind}, not a list" in line
