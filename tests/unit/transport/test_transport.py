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
    held,
    new_holds,
    reading,
    send,
    tags,
)

# Acknowledging


def test_acknowledgements_of_one_turn_make_one_round_trip(
    server: redis.Redis, redis_url: str, hub: Hub
) -> None:
    send(redis_url, range(20))
    with reading(redis_url, prefetch=10) as reader:
        reader.read(10)
        before = calls(server, "hdel")
        for message in reader.messages[:8]:
            message.ack()
        reader.messages[8].reject()
        assert reader.channel.qos.can_consume(), "the places are free before Redis knows"
        assert len(held(server)) == 10
        for callback in hub._pop_ready():
            callback()
        assert held(server) == {reader.messages[9].delivery_tag}
        assert calls(server, "hdel") == before + 1


def test_acknowledgements_travel_with_the_next_command(
    server: redis.Redis, redis_url: str, hub: Hub
) -> None:
    send(redis_url, range(100))
    with reading(redis_url, prefetch=10) as reader:
        reader.read(10)
        for message in reader.messages[:10]:
            message.ack()
        reader.ask()  # before the loop comes to write them
        eventually(lambda: tags(reader).isdisjoint(held(server)))
        reader.read(20)
        assert reader.numbers() == list(range(20))
        assert held(server) == {message.delivery_tag for message in reader.messages[10:]}
        for callback in hub._pop_ready():
            callback()
        assert len(held(server)) == 10


def test_acknowledgements_that_a_lost_connection_cut_off_are_sent_again(
    server: redis.Redis, redis_url: str, hub: Hub
) -> None:
    send(redis_url, range(20))
    worker = new_holds()
    with reading(redis_url, held_by=worker, prefetch=10) as reader:
        reader.read(10)
        server.client_pause(200)
        for message in reader.messages[:5]:
            message.ack()
        reader.ask()
        reader.channel.client.connection.disconnect()  # they may have reached Redis
        reader.connection.collect()
        worker.in_use = lambda: [message.delivery_tag for message in reader.messages[5:]]
        with reading(redis_url, held_by=worker, prefetch=20) as again:
            again.read(10)
            assert again.numbers() == list(range(10, 20)), "nothing that ended comes again"
            expected = {message.delivery_tag for message in reader.messages[5:]} | tags(again)
            eventually(lambda: again.turn() or held(server) == expected, 5, 0)


def test_a_channel_that_closes_acknowledges_first_and_holds_the_rest(
    server: redis.Redis, redis_url: str, hub: Hub
) -> None:
    send(redis_url, range(10))
    with reading(redis_url) as reader:
        for message in reader.read(10)[:6]:
            message.ack()
    assert server.llen("q") == 0
    assert held(server) == {message.delivery_tag for message in reader.messages[6:]}


@pytest.mark.parametrize("has_hub", [False, True])
def test_what_is_acknowledged_without_a_connection_is_written_by_the_next_one(
    server: redis.Redis, redis_url: str, hub: Hub, has_hub: bool
) -> None:
    set_event_loop(hub if has_hub else None)
    send(redis_url, range(5))
    worker = new_holds()
    with reading(redis_url, held_by=worker) as reader:
        reader.read(5)
    for message in reader.messages[:4]:
        message.ack()
    for callback in hub._pop_ready():
        callback()
    assert len(held(server)) == 5
    worker.in_use = lambda: [reader.messages[4].delivery_tag]
    with reading(redis_url, held_by=worker) as again:
        again.read_all()
        assert again.messages == []
        assert held(server) == {reader.messages[4].delivery_tag}
        reader.messages[4].ack()
        for callback in hub._pop_ready():
            callback()
        assert held(server) == set()


def test_what_runs_beyond_its_connection_counts_as_taken(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(20))
    worker = new_holds()
    with reading(redis_url, held_by=worker, prefetch=5) as reader:
        reader.read(5)
    worker.in_use = lambda: [message.delivery_tag for message in reader.messages[:3]]
    with reading(redis_url, held_by=worker, prefetch=5) as again:
        again.read_all()
        assert again.numbers() == [3, 4], "the two that Celery forgot with the connection"
        reader.messages[0].ack()
        again.read(3)
        assert len(held(server)) == 5


def test_what_is_requeued_comes_again_behind_all_others(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(10))
    with reading(redis_url, prefetch=5) as reader:
        for message in list(reader.read(5)):
            message.requeue()
        assert held(server) == set()
        for message in reader.read(10)[5:]:
            message.ack()
        reader.read(15)
        assert reader.numbers() == [*range(5), *range(5, 10), *range(5)]
        assert held(server) == {message.delivery_tag for message in reader.messages[10:]}


@pytest.mark.parametrize("options", [{"no_ack": True}, {}], ids=["no_ack", "no ack_emulation"])
def test_a_consumer_that_does_not_acknowledge_has_no_holds(
    server: redis.Redis, redis_url: str, options: dict[str, Any]
) -> None:
    send(redis_url, range(10))
    given = {} if options else {"ack_emulation": False}
    with reading(redis_url, transport_options=given, **options) as reader:
        reader.read(10)
        assert reader.numbers() == list(range(10))
        assert held(server) == set()


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
            assert sorted(reader.numbers()) == list(range(10))
    eventually(lambda: held(server) == set())


def test_one_that_acknowledges_beside_one_that_does_not_holds_its_messages(
    server: redis.Redis, redis_url: str
) -> None:
    # As in Celery's mingle, while BRPOP waits for both.
    with reading(redis_url) as reader:
        take = reader.messages.append
        with Consumer(reader.channel, [Queue("careless")], on_message=take, no_ack=True):
            send(redis_url, ["careless"] * 3, "careless")
            send(redis_url, ["held"] * 3)
            reader.read(6)
            kept = [
                message
                for message in reader.messages
                if message.delivery_info["routing_key"] == "q"
            ]
            assert held(server) == {message.delivery_tag for message in kept}
            assert len(kept) == 3


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
        assert reader.numbers() == list(range(5))
        assert held(server) == tags(reader)


def test_messages_on_their_way_to_a_closing_channel_are_given_back(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(20))
    with reading(redis_url) as reader:
        reader.read(1)
        reader.ask()
        eventually(lambda: server.llen("q") == 0)
    found = {message.delivery_tag for message in reader.messages}
    assert (server.llen("q"), held(server)) == (20 - len(found), found)
    assert reader.numbers() == list(range(len(found)))


def test_a_channel_closes_when_its_server_is_gone(tmp_path: Path, hub: Hub) -> None:
    worker = new_holds()
    with outages.outage(tmp_path) as broker:
        send(broker.server.broker_url, range(20))
        connection = connect(broker.server.broker_url, worker)
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
    runs = reader.messages[2:5]
    worker.in_use = lambda: [message.delivery_tag for message in runs]
    with outages.outage(tmp_path) as back, reading(back.server.broker_url, held_by=worker) as again:
        again.read_all()
        # Two were acknowledged, one of them while the server was away; three run; the messages of
        # the answer that was on its way were never read, and come again.
        assert again.numbers() == list(range(5, 20))
        with redis.Redis(unix_socket_path=str(back.server.socket)) as server:
            eventually(
                lambda: (
                    again.turn()
                    or held(server)
                    == {message.delivery_tag for message in [*runs, *again.messages]}
                ),
                *(5, 0),
            )


def test_what_is_given_back_is_the_next_again_in_its_order(
    server: redis.Redis, redis_url: str
) -> None:
    send(redis_url, range(50))
    worker = new_holds()
    with reading(redis_url, "q", "other", held_by=worker, prefetch=20) as reader:
        cancel_while_messages_come(reader, server, left=48)
    with reading(redis_url, held_by=worker) as again:
        again.read(50)
        assert again.numbers() == list(range(50))


def test_messages_that_a_lost_server_cut_off_come_again(tmp_path: Path) -> None:
    worker = new_holds()
    with outages.outage(tmp_path) as gone:
        send(gone.server.broker_url, range(10))
        connection = connect(gone.server.broker_url, worker)
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
    with outages.outage(tmp_path) as back, reading(back.server.broker_url, held_by=worker) as again:
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


def test_only_redis_and_its_sentinel_are_replaced() -> None:
    kinds = {
        url: connect(url).get_transport_cls() is Connection(url).get_transport_cls()
        for url in ("memory://", "sentinel://host", "amqp://host", "redis://")
    }
    assert [url for url, is_kombus in kinds.items() if not is_kombus] == [
        *("sentinel://host", "redis://"),
    ]
