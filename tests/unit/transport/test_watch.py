"""Waiting for messages without taking them: what Redis tells, and what happens when it cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from kombu import Queue
from kombu.asynchronous import Hub

from gw_celery.transport import transport as transport_watch
from tests.processes import eventually
from tests.unit.worker.redis_readers import Reader, calls, reading, send, tags, unacknowledged


class Worker:
    """A reader on the event loop of a worker, one turn at a time."""

    def __init__(self, reader: Reader, hub: Hub) -> None:
        self.reader = reader
        self.hub = hub
        reader.connection.register_with_event_loop(hub)

    @property
    def watch(self) -> transport_watch.Watch:
        watch: transport_watch.Watch = self.reader.channel._watch
        return watch

    def turn(self) -> bool:
        self.hub.call_later(0.02, lambda: None)  # what bounds the turn
        self.hub.run_once()
        return False

    def fall_idle(self) -> None:
        eventually(lambda: self.turn() or self._is_waiting(), 10, 0)

    def _is_waiting(self) -> bool:
        watch = self.reader.channel._watch
        return watch is not None and watch._look_at is not None

    def read(self, count: int) -> list[Any]:
        eventually(lambda: self.turn() or len(self.reader.messages) >= count, 10, 0)
        return self.reader.numbers()


@pytest.fixture
def start(
    redis_url: str, server: redis.Redis, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    server.config_resetstat()
    # Looking again now and then would hide that nothing was told.
    monkeypatch.setattr(transport_watch, "LOOK_AGAIN", 1000.0)
    with ExitStack() as stack:

        def reader(*queues: Queue | str, **options: Any) -> Worker:
            return Worker(stack.enter_context(reading(redis_url, *queues, **options)), hub)

        yield reader


def test_an_idle_worker_that_is_killed_has_taken_nothing(
    start: Any, server: redis.Redis, redis_url: str
) -> None:
    start().fall_idle()
    send(redis_url, range(3))
    # It has not come to read anything; BRPOP would have answered by now.
    assert server.llen("q") == 3
    assert calls(server, "brpop") == 0


def test_the_first_message_after_a_pause_is_recorded_as_it_is_taken(
    start: Any, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    for number in range(5):
        worker.fall_idle()
        send(redis_url, [number])
        assert worker.read(number + 1)[-1] == number
    assert unacknowledged(server) == tags(worker.reader)
    assert calls(server, "brpop") == 0


def test_a_worker_that_looked_away_for_long_probes_the_link(start: Any, redis_url: str) -> None:
    worker = start()
    worker.fall_idle()
    # All slots were taken for longer than redis-py lets a connection be silent.
    worker.watch._link.next_health_check = 0.0
    worker.watch._probe()
    eventually(lambda: worker.turn() or not worker.watch._owes_answer, 10, 0)
    send(redis_url, [1])
    assert worker.read(1) == [1]


def test_messages_of_every_queue_and_priority_wake_it(start: Any, redis_url: str) -> None:
    worker = start("q", "other")
    sent = [("q", 0), ("other", 0), ("q", 9), ("other", 3)]
    for number, (queue, priority) in enumerate(sent):
        worker.fall_idle()
        send(redis_url, [number], queue=queue, priority=priority)
        assert worker.read(number + 1)[-1] == number


def test_an_idle_worker_asks_nothing(start: Any, server: redis.Redis) -> None:
    worker = start()
    worker.fall_idle()
    asked = calls(server, "exists"), calls(server, "evalsha")
    for _ in range(20):
        worker.turn()
    assert (calls(server, "exists"), calls(server, "evalsha")) == asked


def test_a_queue_that_joins_is_looked_into_at_once(
    start: Any, server: redis.Redis, redis_url: str
) -> None:
    worker = start("q")
    send(redis_url, [1], queue="late")
    worker.fall_idle()
    worker.reader.consumer.add_queue(Queue("late"))
    worker.reader.consumer.consume()
    worker.turn()  # asks whether there are any
    assert worker.read(1) == [1]


def test_a_message_that_comes_while_it_asks_is_not_overlooked(start: Any, redis_url: str) -> None:
    worker = start()
    worker.fall_idle()
    send(redis_url, [1])
    worker.read(1)
    # Each of the next turns is at another point between the last message and falling idle.
    for number in range(2, 12):
        for _ in range(number % 4):
            worker.turn()
        send(redis_url, [number])
        assert worker.read(number)[-1] == number


def ask_while_empty(worker: Worker, server: redis.Redis) -> None:
    """Have the server say that there is nothing, and leave its answer unread."""
    worker.fall_idle()
    asked = calls(server, "exists")
    worker.watch.wake()
    worker.reader.ask()
    eventually(lambda: calls(server, "exists") > asked)


def test_what_is_told_before_the_answer_is_read_is_not_forgotten(
    start: Any, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    ask_while_empty(worker, server)
    send(redis_url, [1])
    eventually(lambda: worker.watch._link.can_read(timeout=0))
    worker.watch._read()
    assert worker.read(1) == [1]
    worker.fall_idle()
    send(redis_url, [2])
    assert worker.read(2) == [1, 2]


def test_a_queue_that_joins_before_the_answer_is_read_is_looked_into(
    start: Any, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    send(redis_url, [1], queue="late")
    ask_while_empty(worker, server)
    worker.reader.consumer.add_queue(Queue("late"))
    worker.reader.consumer.consume()
    assert worker.read(1) == [1]


def test_a_full_window_wakes_no_worker_and_loses_nothing(start: Any, redis_url: str) -> None:
    worker = start(prefetch=1)
    worker.fall_idle()
    send(redis_url, range(3))
    worker.read(1)
    for _ in range(5):
        worker.turn()
    assert len(worker.reader.messages) == 1
    for taken in range(2):
        worker.reader.messages[taken].ack()
        worker.read(taken + 2)
    assert worker.reader.numbers() == [0, 1, 2]


@pytest.mark.parametrize("refused", ["-client|tracking", "-client"])
def test_where_redis_does_not_tell_it_waits_as_kombu_does(
    start: Any,
    server: redis.Redis,
    redis_url: str,
    refused: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.execute_command("ACL", "SETUSER", "default", refused)
    with caplog.at_level(logging.WARNING):
        worker = start()
        for _ in range(10):
            worker.turn()
        send(redis_url, range(20))
        assert worker.read(20) == list(range(20))
    assert [one.getMessage()[:30] for one in caplog.records] == ["Redis tells us of no new messa"]
    assert calls(server, "brpop") > 0


def test_a_link_that_is_cut_ends_the_connection(start: Any, server: redis.Redis) -> None:
    worker = start()
    worker.fall_idle()
    server.client_kill_filter(_id=str(worker.watch._id))
    with pytest.raises(redis.ConnectionError):
        eventually(worker.turn, 10, 0)


def test_a_database_that_is_flushed_ends_at_most_the_connection(
    start: Any, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    worker.fall_idle()
    server.flushall()
    try:
        for _ in range(50):
            worker.turn()
    except redis.exceptions.ConnectionError:
        worker = start()  # as a worker connects again
    send(redis_url, [1])
    assert worker.read(1) == [1]


def test_a_link_that_is_silent_ends_the_connection(start: Any) -> None:
    worker = start()
    worker.fall_idle()
    due = worker.watch._look_at
    assert due is not None
    assert not worker.watch.is_due(due - 0.1)
    assert worker.watch.is_due(due)  # asks over the link, too
    with pytest.raises(redis.ConnectionError, match=r"did not answer for 1000 s"):
        worker.watch.is_due(due + 1001)


def test_a_link_that_answers_is_kept(start: Any) -> None:
    worker = start()
    for _ in range(3):
        worker.fall_idle()
        due = worker.watch._look_at
        assert due is not None
        assert worker.watch.is_due(due)
        eventually(lambda: worker.turn() or not worker.watch._owes_answer, 10, 0)
        worker.watch.wake()


def test_a_reading_connection_that_was_made_anew_is_followed_again(
    start: Any, redis_url: str
) -> None:
    worker = start()
    worker.fall_idle()
    worker.reader.channel.client.connection.disconnect()
    worker.watch.wake()
    worker.fall_idle()
    send(redis_url, [1])
    assert worker.read(1) == [1]


def test_nothing_is_left_of_it(server: redis.Redis, redis_url: str, hub: Hub) -> None:
    before = {one["id"] for one in server.client_list()}
    with reading(redis_url) as reader:
        worker = Worker(reader, hub)
        worker.fall_idle()
        link = worker.watch._link._sock.fileno()
    assert link not in hub.readers
    eventually(lambda: {one["id"] for one in server.client_list()} <= before)
