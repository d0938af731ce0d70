"""The lengths of the queues of a RabbitMQ, as a worker that scales itself reads them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import ChannelError, NotFound, PreconditionFailed
from celery import Celery

from tests.cluster_harness import Member, Project, total

Lengths = dict[str, tuple[int, int | None]]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({}, (0, None)),
        ({"a": (2, None)}, (2, None)),
        ({"a": (2, None), "b": (3, None)}, (5, None)),
        ({"a": (2, 3), "b": (3, 1), "c": (100, 100)}, (5, 3)),
        ({"a": (0, 0), "b": (0, 0)}, (0, 0)),
    ],
)
def test_the_queues_of_a_service_are_as_long_as_all_of_them(
    lengths: Lengths, expected: tuple[int, int | None]
) -> None:
    assert total(lengths, ["a", "b"]) == expected


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

    def __enter__(self) -> Rabbit:
        return self

    def __exit__(self, *_: object) -> None: ...

    def get_transport_cls(self) -> Any:
        return types.SimpleNamespace(driver_type="amqp")

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


@pytest.fixture
def rabbit() -> Rabbit:
    return Rabbit(celery=(1, 2))


@pytest.fixture
def project(rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    with Celery(broker="amqp://", backend="cache+memory://", set_as_current=False) as app:
        monkeypatch.setattr(app, "connection_for_read", lambda: rabbit)
        with Project(app, None).running() as project:
            yield project


@pytest.fixture
def worker(project: Project) -> Member:
    member = project.add("a@h")
    member.follow(lambda: None)
    return member


def read(project: Project) -> Lengths | None:
    """The lengths that were read in a round, if they were."""
    (worker,) = project.workers.values()
    project.now += 5.1  # what was read before says nothing about now
    project.after(1)
    return None if (reading := worker.reading()) is None else reading.lengths


def test_rabbitmq_tells_messages_and_consumers_within_its_time(
    project: Project, worker: Member, rabbit: Rabbit
) -> None:
    expected = {"gpu.A100.model": (7, 3), "celery": (1, 2)}
    assert [read(project), read(project)] == [expected, expected]
    assert (rabbit.connected, rabbit.opened) == (1, 1)
    assert (rabbit.connect_timeout, rabbit.transport_options["read_timeout"]) == (2.5, 2.5)


def test_a_queue_that_is_not_declared_yet_is_empty_and_hides_no_other(
    project: Project, worker: Member, rabbit: Rabbit
) -> None:
    del rabbit.counts["celery"]
    assert read(project) == {"gpu.A100.model": (7, 3), "celery": (0, 0)}


def test_any_other_error_is_no_length_and_ends_the_connection(
    project: Project, worker: Member, rabbit: Rabbit
) -> None:
    del rabbit.counts["celery"]
    rabbit.error = PreconditionFailed
    assert read(project) is None
    assert rabbit.released == 1


@pytest.mark.parametrize("was_connected", [False, True])
def test_a_broker_that_is_away_is_told_once_and_asked_ever_more_rarely(
    project: Project,
    worker: Member,
    rabbit: Rabbit,
    caplog: pytest.LogCaptureFixture,
    was_connected: bool,
) -> None:
    if was_connected:
        assert read(project)
    rabbit.is_away, tries = True, []
    for second in range(64):
        before = rabbit.released
        project.after(1)
        if rabbit.released > before:
            tries.append(second)
    assert tries == [0, 1, 3, 7, 15, 31, 47, 63]
    assert worker.reading() is None
    rabbit.is_away = False
    project.now += 16.0
    assert read(project)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "the queue lengths cannot be read, so the pool keeps its size",
        "this outage is over after " + caplog.messages[1].split()[5] + " s",
    ]
    rabbit.is_away = True
    assert read(project) is None
    rabbit.is_away = False
    project.now += 1.0
    assert read(project), "the waits begin anew"
