"""Messages that would end a worker, and lost brokers: each of these names a mended fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import amqp
import pytest
import redis
from celery.worker import loops
from kombu import Message

from gw_celery import errors
from tests import redis_readers
from tests.processes import eventually
from tests.unit.worker.consuming import Consuming, consuming


class Channel:
    """A channel that notes what is rejected and acknowledged."""

    def __init__(self) -> None:
        self.settled: list[tuple[str, Any, bool]] = []
        self.raises: Exception | None = None

    def basic_reject(self, tag: Any, requeue: bool) -> None:
        if self.raises is not None:
            raise self.raises
        self.settled.append(("rejected", tag, requeue))

    def basic_ack(self, tag: Any, **_: Any) -> None:
        self.settled.append(("acked", tag, False))


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def worker() -> Iterator[Consuming]:
    with consuming() as made:
        yield made


@pytest.fixture
def made(worker: Consuming) -> Any:
    """The consumer of a worker, without a connection."""
    return worker.make()


@pytest.fixture
def asked(worker: Consuming, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the consumer has the pool do."""
    calls: list[str] = []
    for owner, name in ((worker.pool, "poll"), (worker.pool.supervisor, "forget_waiting")):
        monkeypatch.setattr(owner, name, lambda name=name: calls.append(name))
    return calls


def test_what_ended_without_a_broker_is_heard_before_the_next_one_is_read(
    made: Any, asked: list[str]
) -> None:
    with made.connection_for_read() as connection:
        assert connection.connected
        assert asked == ["poll"]


def test_a_cold_shutdown_starts_nothing_in_the_slots_that_are_free_by_then(
    made: Any, asked: list[str]
) -> None:
    made.cancel_active_requests()
    assert asked == ["forget_waiting", "poll"]


@pytest.mark.parametrize(
    "text",
    [
        "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used:"
        " 1800000 ms. This timeout value can be configured, see consumers doc guide to learn more",
        "PRECONDITION_FAILED - consumer ack timed out on channel 1",  # RabbitMQ 3.8
    ],
)
def test_an_input_that_outlasts_rabbitmqs_consumer_timeout_costs_the_connection_only(
    worker: Consuming, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    refused = amqp.exceptions.PreconditionFailed(text, (0, 0))
    monkeypatch.setattr(loops, "synloop", raising(refused))
    made = worker.make()
    assert issubclass(ConnectionResetError, amqp.Connection.connection_errors)
    with pytest.raises(ConnectionResetError) as raised:
        made.loop(*made.loop_args())
    assert raised.value.__cause__ is refused
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "consumer_timeout" in record.message
    assert text in record.message


def test_another_failed_precondition_is_celerys_to_handle(
    worker: Consuming, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'cpu.embed'"
    monkeypatch.setattr(
        loops, "synloop", raising(amqp.exceptions.PreconditionFailed(text, (50, 10)))
    )
    made = worker.make()
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        made.loop(*made.loop_args())
    assert not caplog.records


def message(channel: Channel, **headers: Any) -> Message:
    return Message(
        body=b"body",
        delivery_tag=7,
        channel=channel,
        headers=headers,
        content_type="application/json",
        content_encoding="utf-8",
    )


def handling(made: Any, strategy: Callable[..., None]) -> Callable[[Any], None]:
    made.strategies["proj.embed"] = strategy
    return made.create_task_handler()


def raising(exc: BaseException) -> Callable[..., None]:
    def strategy(*_: Any, **__: Any) -> None:
        raise exc

    return strategy


def test_a_message_reaches_celerys_strategy(made: Any, channel: Channel) -> None:
    seen: list[Any] = []
    handle = handling(made, lambda message, *_: seen.append(message.delivery_tag))
    handle(message(channel, task="proj.embed", id="id-1"))
    assert seen == [7]
    assert channel.settled == []


@pytest.mark.parametrize("exc", [TypeError("timelimit"), KeyError("id"), RecursionError("deep")])
def test_a_message_that_would_end_the_worker_is_rejected_and_told(
    made: Any, channel: Channel, exc: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    handle = handling(made, raising(exc))
    handle(message(channel, task="proj.embed", id="id-1"))
    assert channel.settled == [("rejected", 7, False)]
    (record,) = caplog.records
    assert record.levelname == "CRITICAL"
    assert "task proj.embed[id-1]" in record.message
    assert repr(exc) in record.message
    assert "b'body'" in record.message


class OperationalError(Exception):
    """As database drivers and Django name it."""


@pytest.mark.parametrize(
    "exc",
    [
        errors.ResultsUnavailable("away"),
        errors.DeclaredLost("id-1", "w.0/7"),
        OperationalError("locked"),
    ],
)
def test_a_revoked_message_waits_before_it_is_given_back(
    made: Any, channel: Channel, exc: Exception
) -> None:
    handle = handling(made, raising(exc))
    handle(message(channel, task="proj.embed", id="id-1"))
    assert channel.settled == []
    (scheduled,) = made.timer.schedule.queue
    assert scheduled.eta - time.monotonic() > 0.5
    scheduled.entry()
    assert channel.settled == [("rejected", 7, True)]


def test_the_next_message_is_taken_after_a_bad_one(made: Any, channel: Channel) -> None:
    seen: list[Any] = []

    def strategy(message: Any, *_: Any) -> None:
        if message.headers["id"] == "bad":
            raise ValueError
        seen.append(message.headers["id"])

    handle = handling(made, strategy)
    for name in ("bad", "good"):
        handle(message(channel, task="proj.embed", id=name))
    assert seen == ["good"]


def test_a_lost_broker_is_celerys_to_handle(made: Any, channel: Channel) -> None:
    lost = made.connection_errors[0]("gone")
    handle = handling(made, raising(lost))
    with pytest.raises(type(lost)):
        handle(message(channel, task="proj.embed", id="id-1"))
    assert channel.settled == []


@pytest.mark.parametrize("exc", [MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_what_must_end_the_worker_does(made: Any, channel: Channel, exc: BaseException) -> None:
    handle = handling(made, raising(exc))
    with pytest.raises(type(exc)):
        handle(message(channel, task="proj.embed", id="id-1"))
    assert channel.settled == []


def test_a_rejection_that_a_lost_broker_does_not_hear_ends_nothing(
    made: Any, channel: Channel
) -> None:
    channel.raises = made.connection_errors[0]("gone")
    handle = handling(made, raising(ValueError("bad")))
    handle(message(channel, task="proj.embed", id="id-1"))
    assert channel.settled == []
    channel.raises = None
    handle(message(channel, task="proj.embed", id="id-2"))
    assert channel.settled == [("rejected", 7, False)]


def test_a_message_without_headers_ends_nothing(made: Any, channel: Channel) -> None:
    handle = handling(made, raising(ValueError("bad")))
    for headers in ({}, {"task": None}, {"task": ["unhashable"]}):
        handle(message(channel, **headers))
    without = message(channel, task="proj.embed")
    without.headers = None
    handle(without)
    assert [verdict for verdict, *_ in channel.settled] == ["rejected"] * 4


def test_an_unknown_task_whose_failure_cannot_be_stored_ends_nothing(
    made: Any, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery rejects the message first, and then stores; the result backend may be away."""
    monkeypatch.setattr(made.app.backend, "mark_as_failure", raising(RuntimeError("backend")))
    handle = made.create_task_handler()
    handle(message(channel, task="proj.unknown", id="id-1"))
    assert channel.settled == [("rejected", 7, False)]


# -- large messages --


@pytest.fixture
def stored(made: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """What is stored as the failure of which task."""
    failures: dict[str, Exception] = {}

    def store(task_id: str, exc: Exception, **_: Any) -> None:
        failures[task_id] = exc

    monkeypatch.setattr(made.app.backend, "mark_as_failure", store)
    return failures


@pytest.mark.parametrize("content_type", ["application/json", "application/x-gw-json", "a/b", None])
def test_a_body_over_the_limit_is_refused_before_it_is_decoded(
    made: Any,
    channel: Channel,
    stored: dict[str, Exception],
    content_type: str | None,
) -> None:
    made.app.conf.gw_max_payload_bytes = 100
    seen: list[Any] = []
    handle = handling(made, lambda message, *_: seen.append(message.headers["id"]))
    for size in (100, 101):
        sent = message(channel, task="proj.embed", id=str(size))
        sent.body, sent.content_type = b"x" * size, content_type
        handle(sent)
    assert seen == ["100"]
    assert channel.settled == [("rejected", 7, False)]
    (refusal,) = stored.values()
    assert str(refusal) == (
        "the body has 101 bytes and a worker takes 100: send large data by reference, or raise the "
        "setting gw_max_payload_bytes"
    )


def test_a_body_that_was_refused_while_it_was_decompressed_is_rejected_and_told(
    made: Any, channel: Channel, stored: dict[str, Exception]
) -> None:
    refusal = errors.MessageTooLarge("over 100", 100)
    made.on_decode_error(message(channel, task="proj.embed", id="id-1"), refusal)
    assert channel.settled == [("rejected", 7, False)]
    assert stored == {"id-1": refusal}


@pytest.mark.parametrize("more", [0, 2])
def test_a_worker_that_stops_leaves_no_message_on_its_way(
    made: Any, server: redis.Redis, redis_url: str, more: int
) -> None:
    redis_readers.send(redis_url, range(2 + more))
    with redis_readers.reading(redis_url, prefetch=2) as reader:
        for message in reader.read(2):
            message.ack()
        reader.ask()
        eventually(lambda: server.llen("q") == 0)
        made.task_consumer = reader.consumer
        made.stop()
        assert (len(reader.messages), server.llen("q")) == (2, more)
