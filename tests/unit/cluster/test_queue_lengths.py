from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import ChannelError, NotFound, PreconditionFailed
from celery import Celery

from gw_celery import devserver
from gw_celery.cluster import queue_lengths

QUEUES = {"model": ["gpu.A100.model"], "": ["celery", "mail"]}


@pytest.fixture(params=["", "tenant:"])
def connection(request: pytest.FixtureRequest, gw_broker: devserver.Server) -> Iterator[Any]:
    with Celery("lengths", broker=gw_broker.broker_url, set_as_current=False) as app:
        app.conf.broker_transport_options = {"global_keyprefix": request.param}
        with app.connection_for_write() as connection:
            yield connection


def send(connection: Any, queue: str, count: int, priority: int = 0) -> None:
    with connection.Producer() as producer:
        for number in range(count):
            producer.publish(number, routing_key=queue, priority=priority)


def test_every_priority_of_a_queue_counts_on_redis(connection: Any) -> None:
    for queue in ("gpu.A100.model", "celery", "mail"):
        connection.SimpleQueue(queue).close()
    send(connection, "gpu.A100.model", 2)
    send(connection, "gpu.A100.model", 3, priority=9)
    send(connection, "mail", 1)
    read = queue_lengths.of(connection, QUEUES).read
    assert read() == {"model": queue_lengths.Length(5), "": queue_lengths.Length(1)}


def test_the_lists_of_a_queue_are_those_that_the_app_names(gw_broker: devserver.Server) -> None:
    with Celery("lengths", broker=gw_broker.broker_url, set_as_current=False) as app:
        app.conf.broker_transport_options = {"priority_steps": [0, 5], "sep": ":"}
        with app.connection_for_write() as connection:
            connection.SimpleQueue("mail").close()
            send(connection, "mail", 1, priority=5)
            keys = set(queue_lengths.plain_client(connection.default_channel).keys("mail*"))
        reader = queue_lengths.Reader(app, {"mail": ["mail"]})
        assert (keys, reader.read()) == ({b"mail:5"}, {"mail": queue_lengths.Length(1)})
        reader.close()


def test_a_reader_connects_anew_after_a_failure(
    gw_broker: devserver.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Celery("lengths", broker=gw_broker.broker_url, set_as_current=False) as app:
        connections: list[Any] = []

        def failing_once(connection: Any, queues: Any) -> Any:
            connections.append(connection)
            if len(connections) == 1:
                raise ConnectionResetError("gone")
            return queue_lengths.Unreadable()

        monkeypatch.setattr(queue_lengths, "of", failing_once)
        reader = queue_lengths.Reader(app, QUEUES)
        with pytest.raises(ConnectionResetError):
            reader.read()
        assert reader.read() is None
        first, second = connections
        assert (first.connected, second.connected) == (False, True)
        reader.close()
        assert not second.connected


def test_a_queue_that_nobody_has_sent_to_is_empty_on_redis(connection: Any) -> None:
    assert queue_lengths.of(connection, QUEUES).read()["model"].messages == 0


def test_a_transport_that_does_not_tell_has_no_lengths() -> None:
    with (
        Celery("lengths", broker="memory://", set_as_current=False) as app,
        app.connection_for_read() as connection,
    ):
        connection.connect()
        assert queue_lengths.of(connection, QUEUES).read() is None


class Rabbit:
    """RabbitMQ, as its client shows it: an error closes the channel on which it happens."""

    channel_errors = (ChannelError,)

    def __init__(self, counts: dict[str, tuple[int, int]]) -> None:
        self.counts = counts
        self.error: type[ChannelError] = NotFound
        self.opened = 0

    def channel(self) -> Any:
        self.opened += 1
        channel = types.SimpleNamespace(is_open=True)

        def declare(queue: str, passive: bool) -> Any:
            assert passive
            assert channel.is_open
            if queue not in self.counts:
                channel.is_open = False
                raise self.error
            messages, consumers = self.counts[queue]
            return types.SimpleNamespace(message_count=messages, consumer_count=consumers)

        channel.queue_declare = declare
        channel.close = lambda: setattr(channel, "is_open", False)
        return channel


def test_rabbitmq_tells_messages_and_consumers() -> None:
    rabbit = Rabbit({"gpu.A100.model": (7, 3), "celery": (1, 2), "mail": (2, 1)})
    read = queue_lengths.DeclaredLengths(rabbit, QUEUES).read
    assert [read(), read()][1] == {
        "model": queue_lengths.Length(7, 3),
        "": queue_lengths.Length(3, 2),
    }
    assert rabbit.opened == 1


def test_a_queue_that_is_not_declared_yet_is_empty_and_hides_no_other() -> None:
    rabbit = Rabbit({"mail": (2, 1)})
    found = queue_lengths.DeclaredLengths(rabbit, QUEUES).read()
    assert found == {"model": queue_lengths.Length(0, 0), "": queue_lengths.Length(2, 1)}


def test_any_other_error_is_no_length() -> None:
    rabbit = Rabbit({})
    rabbit.error = PreconditionFailed
    with pytest.raises(PreconditionFailed):
        queue_lengths.DeclaredLengths(rabbit, QUEUES).read()
