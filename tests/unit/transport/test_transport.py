"""Our Redis transport: acknowledging in groups, and what ends while messages are on their way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub, set_event_loop

from tests import outages
from tests.processes import eventually
from tests.redis_readers import (
    Reader,
    calls,
    connect,
    foreign,
    reading,
    send,
    tags,
    take_with_kombu,
    unacknowledged,
)

# Acknowledging


def test_acknowledgements_of_one_turn_make_one_round_trip(
    server: redis.Redis, redis_url: str, hub: Hub
) -> None:
    send(redis_url, range(20))
    with reading(redis_url, prefetch=10) as reader:
        reader.read(10)
        before = calls(server, "zrem"), calls(server, "hdel")
        for message in reader.messages[:8]:
            message.ack()
        reader.messages[8].reject()
        assert reader.channel.qos.can_consume()
        for callback in hub._pop_ready():
            callback()
        assert unacknowledged(server) == {reader.messages[9].delivery_tag}
        # One for the acknowledgements, one for what was rejected.
        assert (calls(server, "zrem"), calls(server, "hdel")) == (before[0] + 2, before[1] + 2)


def test_a_channel_that_closes_acknowledges_first(
    server: redis.Redis, redis_url: str, hub: Hub
) -> None:
    send(redis_url, range(10))
    with reading(redis_url) as reader:
        for message in reader.read(10)[:6]:
            message.ack()
    assert server.llen("q") == 4
    assert not server.exists("unacked", "unacked_index")


@pytest.mark.parametrize("has_hub", [False, True])
def test_acknowledging_on_a_closed_channel_does_nothing(
    server: redis.Redis, redis_url: str, hub: Hub, has_hub: bool
) -> None:
    set_event_loop(hub if has_hub else None)
    send(redis_url, range(5))
    with reading(redis_url) as reader:
        reader.read(5)
    for message in reader.messages:
        message.ack()
    for callback in hub._pop_ready():
        callback()
    assert server.llen("q") == 5


def test_what_is_given_back_comes_again(server: redis.Redis, redis_url: str) -> None:
    send(redis_url, range(10))
    with reading(redis_url) as reader:
        for message in list(reader.read(10)):
            message.requeue()
        assert not server.exists("unacked", "unacked_index")
        reader.read(20)
        assert reader.numbers()[10:] == list(range(10))
        assert unacknowledged(server) == tags(reader)


def test_a_consumer_that_does_not_acknowledge_leaves_nothing(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    with reading(redis_url, no_ack=True) as reader:
        reader.read(10)
        assert reader.numbers() == list(range(10))
        assert not server.exists("unacked", "unacked_index")


def test_what_was_taken_for_one_that_acknowledges_is_freed_by_one_that_does_not(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    with reading(redis_url) as reader:
        reader.read(1)[0].ack()
        reader.ask()
        reader.consumer.cancel()
        queue, take = Queue("q"), reader.messages.append
        with Consumer(reader.channel, [queue], on_message=take, no_ack=True):
            reader.read(10)
        assert reader.numbers() == list(range(10))
        assert not server.exists("unacked", "unacked_index")


def test_without_acknowledgements_at_all_nothing_is_recorded(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    with reading(redis_url, transport_options={"ack_emulation": False}) as reader:
        reader.read(10)
        for message in reader.messages:
            message.ack()
        assert not server.exists("unacked", "unacked_index")


# Queues and connections that end


def cancel_while_messages_come(reader: Reader, server: redis.Redis, left: int = 0) -> None:
    """Cancel the queue when the answer with its messages is on its way, and read that answer."""
    reader.read(1)
    reader.ask()
    reader.consumer.cancel_by_queue("q")
    eventually(lambda: server.llen("q") <= left)
    reader.read_all()


def test_a_queue_that_closes_while_its_messages_come_gives_them_back(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(5))
    with reading(redis_url, "q", "other") as reader:
        cancel_while_messages_come(reader, server)
        assert (len(reader.messages), server.llen("q")) == (1, 4)
        reader.consumer.add_queue(Queue("q"))
        reader.consumer.consume()
        reader.read(5)
        assert sorted(reader.numbers()) == list(range(5))
        # Recorded before, given back, and taken again: singly, or by the script.
        assert unacknowledged(server) == tags(reader)


def test_messages_on_their_way_to_a_closing_channel_are_given_back(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(20))
    with reading(redis_url) as reader:
        reader.read(1)
        reader.ask()
        eventually(lambda: server.llen("q") == 0)
    assert server.llen("q") == 20
    assert not server.exists("unacked", "unacked_index")


def test_a_channel_closes_when_its_server_is_gone(tmp_path: Path, hub: Hub) -> None:
    with outages.outage(tmp_path) as broker:
        send(broker.server.broker_url, range(20))
        connection = connect(broker.server.broker_url)
        reader = Reader(connection, [Queue("q")], prefetch=10)
        reader.read(5)[0].ack()
        reader.ask()
    # What Celery does with a connection that is lost.
    connection.collect()
    assert reader.channel.closed
    connection.close()
    reader.messages[1].ack()
    for callback in hub._pop_ready():
        callback()
    with outages.outage(tmp_path) as back:
        again = connect(back.server.broker_url)
        second = Reader(again, [Queue("q")])
        second.read_all()
        # The answer that was on its way when the server ended may be lost: its message is recorded.
        assert len(second.messages) >= 17
        again.close()
        found = take_with_kombu(back.server.broker_url)
        # Two were acknowledged, one of them while the server was away.
        assert len({one.delivery_tag for one in found}) == 18


def test_what_is_given_back_is_the_next_again_in_its_order(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(50))
    with reading(redis_url, "q", "other", prefetch=20) as reader:
        cancel_while_messages_come(reader, server, left=48)
    with reading(redis_url) as reader:
        reader.read(50)
        assert reader.numbers() == list(range(50))


def test_a_message_that_could_not_be_recorded_is_given_back_too(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(2))
    # The script does not read escapes: it takes this tag for another.
    server.lpush("q", json.dumps(foreign()).replace('"real"', '"re\\u0061l"'))
    with reading(redis_url, "q", "other") as reader:
        cancel_while_messages_come(reader, server)
    with reading(redis_url) as reader:
        reader.read(3)
        assert reader.numbers() == [0, 1, "foreign"]
        assert unacknowledged(server) == tags(reader)


def test_messages_that_a_lost_server_cut_off_come_again(tmp_path: Path) -> None:
    with outages.outage(tmp_path) as gone:
        send(gone.server.broker_url, range(10))
        connection = connect(gone.server.broker_url)
        reader = Reader(connection, [Queue("q")])

        def take(message: Any) -> None:
            reader.messages.append(message)
            if len(reader.messages) == 3:
                gone.stop()
                raise ConnectionError("the broker is away")

        reader.consumer.on_message = take
        with pytest.raises((ConnectionError, redis.ConnectionError)):
            reader.read(10)
        connection.collect()
        connection.close()
    with outages.outage(tmp_path) as back, reading(back.server.broker_url) as again:
        again.read_all()
        assert sorted(again.numbers()) == list(range(10))


def test_a_dropped_connection_s_answer_is_not_waited_for(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    with reading(redis_url, prefetch=5) as reader:
        reader.read(1)
        reader.ask()
        # As kombu does when an answer is overdue.
        reader.channel.client.connection.disconnect()
        other = Consumer(
            reader.channel, [Queue("other")], on_message=reader.messages.append, no_ack=True
        )
        with other:
            send(redis_url, ["other"], "other")
            reader.read(3)
        assert "other" in reader.numbers()


# Connections


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:secret@host:6380/3",
        "rediss://host//?ssl_cert_reqs=CERT_NONE",
        "redis://one:1;redis://two:2",
        "redis+socket:///a/b.sock?virtual_host=4",
        "memory://",
        "sentinel://host:26379",
        "amqp://guest@host/vhost",
    ],
)
def test_a_connection_looks_like_celery_s(url: str) -> None:
    plain, ours = Connection(url), connect(url)
    assert ours.info() == plain.info()
    assert ours.as_uri(include_password=True) == plain.as_uri(include_password=True)
    assert ours.clone().get_transport_cls() is ours.get_transport_cls()
    assert json.dumps(ours.info()) == json.dumps(plain.info())
    assert ours.transport.driver_type == plain.transport.driver_type


def test_only_plain_redis_is_replaced() -> None:
    kinds = {
        url: connect(url).get_transport_cls() is Connection(url).get_transport_cls()
        for url in ("memory://", "sentinel://host", "amqp://host", "redis://")
    }
    assert [url for url, is_kombus in kinds.items() if not is_kombus] == ["redis://"]
