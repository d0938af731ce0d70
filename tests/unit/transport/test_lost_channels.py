"""Messages that end after the connection that brought them was lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Connection, Queue

from gw_celery.transport import holds, transport
from tests.redis_readers import Reader, send


@pytest.fixture
def held() -> holds.Holds:
    return holds.Holds("reader", 15.0)


@pytest.fixture
def lost(redis_url: str, held: holds.Holds) -> Iterator[Any]:
    """A message that the pool has, without the connection that brought it."""
    send(redis_url, [1])
    reader = connected(redis_url, held)
    (message,) = reader.read(1)
    held.in_use = lambda: [message.delivery_tag]
    reader.connection.close()
    return message


def connected(url: str, held: holds.Holds) -> Reader:
    options = {"polling_interval": 0.05}
    connection = transport.use(Connection(url, transport_options=options), held)
    return Reader(connection, [Queue("q")], prefetch=1)


def test_what_is_given_back_after_a_reconnect_comes_again(
    server: redis.Redis, redis_url: str, held: holds.Holds, lost: Any
) -> None:
    reader = connected(redis_url, held)
    try:
        assert not reader.channel.qos.can_consume()
        held.in_use = tuple
        lost.reject(requeue=True)
        assert reader.channel.qos.can_consume()
        (again,) = reader.read(1)
        assert again.delivery_info["redelivered"] is True
        assert [again.body, again.delivery_tag == lost.delivery_tag] == [lost.body, False]
    finally:
        reader.connection.close()


def test_what_a_server_refused_to_take_back_comes_again(
    server: redis.Redis, redis_url: str, held: holds.Holds, lost: Any
) -> None:
    reader = connected(redis_url, held)
    try:
        held.in_use = tuple
        held_in, number = holds.key("", held.incarnation), lost.delivery_tag.rpartition("/")[2]
        message: Any = server.hget(held_in, number)
        server.hset(held_in, number, b"other\n" + message.partition(b"\n")[2])
        server.set("other", "is no list")
        lost.reject(requeue=True)
        server.delete("other")
        reader.channel._give_back_unknown()
        assert server.llen("other") == 1
    finally:
        reader.connection.close()


def test_what_is_given_back_before_a_reconnect_comes_again(
    redis_url: str, held: holds.Holds, lost: Any
) -> None:
    held.in_use = tuple
    lost.reject(requeue=True)
    reader = connected(redis_url, held)
    try:
        (again,) = reader.read(1)
        assert again.body == lost.body
    finally:
        reader.connection.close()
