"""A worker that stops and waits for its pool: what Celery's loop would do, as far as it may."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Message
from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from tests.unit.worker.consuming import Consuming, consuming


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


class Stopping:
    """A worker with one input in flight, on Celery's own event loop."""

    def __init__(self, worker: Consuming, hub: Hub) -> None:
        self._harness = worker.harness
        self._hub = worker.hub = hub
        #: How Celery's consumer queues an acknowledgement.
        self.call_soon: Callable[..., Any] = worker.make().call_soon

    def stop(self, turns: int = 1) -> None:
        """Stop the worker, whose input ends after so many turns of the wait for it."""
        harness = self._harness
        for child in harness.children:
            child.ready()
        request = harness.submit()
        child = harness.child_of(request)
        child.accept(request)
        left = iter(range(turns))

        def turn() -> None:
            harness.now += 0.1
            if next(left, None) is None:
                if not request.heard[1:]:
                    child.done(request)
                child.die(code=0)

        self._hub.call_repeatedly(0.001, turn)
        loop = get_event_loop()
        set_event_loop(self._hub)
        try:
            harness.stop()
        finally:
            set_event_loop(loop)
        assert request.heard == ["accepted", "done"]


@pytest.fixture
def stopping(hub: Hub) -> Iterator[Stopping]:
    with consuming() as worker:
        yield Stopping(worker, hub)


@pytest.fixture
def channel() -> Channel:
    return Channel()


def message(channel: Channel, tag: int) -> Message:
    return Message(body=b"", delivery_tag=tag, channel=channel)


def test_what_celery_has_queued_to_acknowledge_is_written_once(
    stopping: Stopping, channel: Channel
) -> None:
    stopping.call_soon(message(channel, 1).ack_log_error, None, ())
    stopping.call_soon(message(channel, 2).reject_log_error, None, (), True)
    stopping.stop()
    assert sorted(channel.settled) == [("acked", 1), ("requeued", 2)]


def test_nothing_else_that_is_queued_runs_and_nothing_is_lost(
    stopping: Stopping, hub: Hub, channel: Channel
) -> None:
    ran: list[str] = []
    hub.call_soon(ran.append, "transport")
    stopping.call_soon(ran.append, "consumer")
    stopping.call_soon(message(channel, 1).ack_log_error, None, ())
    stopping.stop()
    assert ran == []
    assert channel.settled == [("acked", 1)]
    next(hub.loop)
    assert sorted(ran) == ["consumer", "transport"]


def test_an_acknowledgement_that_fails_holds_up_no_other(
    stopping: Stopping, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Channel(), Channel()
    bad.raises = RuntimeError("connection lost")
    for tag in range(5):
        stopping.call_soon(message(bad, tag).ack_log_error, None, ())
        stopping.call_soon(message(good, tag).ack_log_error, None, ())
    stopping.stop()
    assert len(good.settled) == 5
    assert caplog.text.count("an acknowledgement failed") == 5


def test_timers_that_are_due_fire_and_others_wait(stopping: Stopping, hub: Hub) -> None:
    fired: list[str] = []
    hub.call_later(-1, fired.append, "due")
    hub.call_later(3600, fired.append, "later")
    stopping.stop()
    assert fired == ["due"]


@pytest.mark.parametrize("exc", [ValueError("heartbeat"), AssertionError(), MemoryError()])
def test_a_timer_that_fails_ends_no_drain(
    stopping: Stopping, hub: Hub, channel: Channel, exc: Exception
) -> None:
    def fail() -> None:
        raise exc

    hub.call_later(-1, fail)
    stopping.call_soon(message(channel, 1).ack_log_error, None, ())
    stopping.stop()
    assert channel.settled == [("acked", 1)]


def test_a_reader_of_the_hub_is_not_called(stopping: Stopping, hub: Hub) -> None:
    ran: list[str] = []
    readable, writable = os.pipe()
    try:
        os.write(writable, b"x")
        hub.add_reader(readable, ran.append, "a message for a closed pool")
        stopping.stop()
        assert ran == []
    finally:
        hub.remove(readable)
        os.close(readable)
        os.close(writable)
