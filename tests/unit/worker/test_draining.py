from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import Message
from kombu.asynchronous import Hub, set_event_loop

from gw_celery.worker import consumer, draining


class Channel:
    no_ack_consumers = None

    def __init__(self) -> None:
        self.settled: list[tuple[str, Any]] = []
        self.raises: Exception | None = None

    def basic_ack(self, tag: Any, **_: Any) -> None:
        self.settle("acked", tag)

    def basic_reject(self, tag: Any, requeue: bool) -> None:
        self.settle("requeued" if requeue else "rejected", tag)

    def settle(self, how: str, tag: Any) -> None:
        if self.raises is not None:
            raise self.raises
        self.settled.append((how, tag))


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()
    set_event_loop(None)


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def call_soon(celery_app: Celery, hub: Hub) -> Callable[..., Any]:
    """How Celery's consumer queues an acknowledgement."""
    worker = types.SimpleNamespace(use_eventloop=True)
    made = consumer.Consumer(lambda request: None, app=celery_app, hub=hub, controller=worker)
    return made.call_soon


def message(channel: Channel, tag: int) -> Message:
    return Message(body=b"", delivery_tag=tag, channel=channel)


def test_what_celery_has_queued_to_acknowledge_is_written_once(
    hub: Hub, channel: Channel, call_soon: Callable[..., Any]
) -> None:
    call_soon(message(channel, 1).ack_log_error, None, ())
    call_soon(message(channel, 2).reject_log_error, None, (), True)
    draining.run_meanwhile(hub)
    draining.run_meanwhile(hub)
    assert sorted(channel.settled) == [("acked", 1), ("requeued", 2)]


def test_nothing_else_that_is_queued_runs_and_nothing_is_lost(
    hub: Hub, channel: Channel, call_soon: Callable[..., Any]
) -> None:
    ran: list[str] = []
    hub.call_soon(ran.append, "transport")
    call_soon(ran.append, "consumer")
    call_soon(message(channel, 1).ack_log_error, None, ())
    draining.run_meanwhile(hub)
    assert ran == []
    assert channel.settled == [("acked", 1)]
    for callback in hub._pop_ready():
        callback()
    assert sorted(ran) == ["consumer", "transport"]


def test_an_acknowledgement_that_fails_holds_up_no_other(
    hub: Hub, call_soon: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Channel(), Channel()
    bad.raises = RuntimeError("connection lost")
    for tag in range(5):
        call_soon(message(bad, tag).ack_log_error, None, ())
        call_soon(message(good, tag).ack_log_error, None, ())
    draining.run_meanwhile(hub)
    assert len(good.settled) == 5
    assert caplog.text.count("an acknowledgement failed") == 5


def test_timers_that_are_due_fire_and_others_wait(hub: Hub) -> None:
    fired: list[str] = []
    hub.call_later(-1, fired.append, "due")
    hub.call_later(3600, fired.append, "later")
    draining.run_meanwhile(hub)
    assert fired == ["due"]


@pytest.mark.parametrize("exc", [ValueError("heartbeat"), AssertionError(), MemoryError()])
def test_a_timer_that_fails_ends_no_drain(
    hub: Hub, channel: Channel, call_soon: Callable[..., Any], exc: Exception
) -> None:
    def fail() -> None:
        raise exc

    hub.call_later(-1, fail)
    call_soon(message(channel, 1).ack_log_error, None, ())
    draining.run_meanwhile(hub)
    draining.run_meanwhile(hub)
    assert channel.settled == [("acked", 1)]


def test_a_reader_of_the_hub_is_not_called(hub: Hub) -> None:
    ran: list[str] = []
    readable, writable = os.pipe()
    try:
        os.write(writable, b"x")
        hub.add_reader(readable, ran.append, "a message for a closed pool")
        draining.run_meanwhile(hub)
        assert ran == []
    finally:
        hub.remove(readable)
        os.close(readable)
        os.close(writable)
