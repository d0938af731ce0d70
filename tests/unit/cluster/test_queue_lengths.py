from __future__ import annotations

import types
from typing import Any

import pytest
from amqp.exceptions import ChannelError, NotFound, PreconditionFailed

from gw_celery.cluster import queue_lengths
from gw_celery.cluster.queue_lengths import Length

QUEUES = ["gpu.A100.model", "celery", "mail"]


@pytest.mark.parametrize(
    ("lengths", "total"),
    [
        ({}, Length(0)),
        ({"a": Length(2)}, Length(2)),
        ({"a": Length(2), "b": Length(3)}, Length(5)),
        ({"a": Length(2, 3), "b": Length(3, 1), "c": Length(100, 100)}, Length(5, 3)),
        ({"a": Length(0, 0), "b": Length(0, 0)}, Length(0, 0)),
    ],
)
def test_the_queues_of_a_service_are_as_long_as_all_of_them(
    lengths: dict[str, Length], total: Length
) -> None:
    assert queue_lengths.total(lengths, ["a", "b"]) == total


class Rabbit:
    """RabbitMQ, as its client shows it: an error closes the channel on which it happens."""

    channel_errors = (ChannelError,)

    def __init__(self, **counts: tuple[int, int]) -> None:
        self.counts = {"gpu.A100.model": (7, 3)} | counts
        self.error: type[ChannelError] = NotFound
        self.is_away = False
        self.opened = self.connected = self.released = 0
        self.connect_timeout = 4.0
        self.transport_options: dict[str, Any] = {}

    def ensure_connection(self, **_: Any) -> None:
        self.connected += 1
        if self.is_away:
            raise ConnectionRefusedError("away")

    def release(self) -> None:
        self.released += 1

    def channel(self) -> Any:
        self.opened += 1
        channel = types.SimpleNamespace(is_open=True)

        def declare(queue: str, passive: bool) -> Any:
            assert passive
            assert channel.is_open
            if self.is_away:
                raise TimeoutError("silent")
            if queue not in self.counts:
                channel.is_open = False
                raise self.error
            messages, consumers = self.counts[queue]
            return types.SimpleNamespace(message_count=messages, consumer_count=consumers)

        channel.queue_declare = declare
        channel.close = lambda: setattr(channel, "is_open", False)
        return channel


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(queue_lengths, "time", clock)


def reader(rabbit: Rabbit) -> queue_lengths.DeclaredLengths:
    app = types.SimpleNamespace(connection_for_read=lambda: rabbit)
    return queue_lengths.DeclaredLengths(app, 2.5)


def test_rabbitmq_tells_messages_and_consumers_within_its_time() -> None:
    rabbit = Rabbit(celery=(1, 2), mail=(2, 1))
    reading = reader(rabbit)
    expected = {"gpu.A100.model": Length(7, 3), "celery": Length(1, 2), "mail": Length(2, 1)}
    assert [reading.read(QUEUES), reading.read(QUEUES)] == [expected, expected]
    assert (rabbit.connected, rabbit.opened) == (1, 1)
    assert (rabbit.connect_timeout, rabbit.transport_options["read_timeout"]) == (2.5, 2.5)


def test_a_queue_that_is_not_declared_yet_is_empty_and_hides_no_other() -> None:
    lengths = reader(Rabbit(mail=(2, 1))).read(QUEUES)
    assert lengths == {
        "gpu.A100.model": Length(7, 3),
        "celery": Length(0, 0),
        "mail": Length(2, 1),
    }


def test_any_other_error_is_no_length_and_ends_the_connection() -> None:
    rabbit = Rabbit()
    rabbit.error = PreconditionFailed
    assert reader(rabbit).read(QUEUES) is None
    assert rabbit.released == 1


@pytest.mark.parametrize("was_connected", [False, True])
def test_a_broker_that_is_away_is_told_once_and_asked_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, was_connected: bool
) -> None:
    clock, rabbit = Clock(monkeypatch), Rabbit()
    reading = reader(rabbit)
    if was_connected:
        assert reading.read(QUEUES)
    rabbit.is_away, tries = True, []
    for second in range(64):
        before = rabbit.released
        assert reading.read(QUEUES) is None
        if rabbit.released > before:
            tries.append(second)
        clock.now += 1.0
    assert tries == [0, 1, 3, 7, 15, 31, 47, 63]
    rabbit.is_away = False
    clock.now += 16.0
    assert reading.read(QUEUES)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "the lengths of the queues cannot be read, so that the pool keeps its size",
        "over after " + caplog.messages[1].split()[2] + " s",
    ]
    rabbit.is_away = True
    reading.read(QUEUES)
    rabbit.is_away = False
    clock.now += 1.0
    assert reading.read(QUEUES), "the waits begin anew"
