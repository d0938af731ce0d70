"""Waiting for messages without taking them: what Redis tells, and what happens when it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from kombu import Queue
from kombu.asynchronous import Hub

from tests.processes import eventually
from tests.redis_readers import (
    Worker,
    calls,
    held,
    looking_again,
    reading,
    send,
    silencing,
    tags,
)

Start = Callable[..., Worker]


@pytest.fixture
def start(redis_url: str, server: redis.Redis, hub: Hub) -> Iterator[Start]:
    server.config_resetstat()
    with ExitStack() as stack:
        # Looking again now and then would hide that nothing was told.
        stack.enter_context(looking_again(1000.0))

        def reader(*queues: str, url: str = redis_url, **options: object) -> Worker:
            made = stack.enter_context(reading(url, *queues, **options))
            return Worker(made, hub, server)

        yield reader


def test_an_idle_worker_that_is_killed_has_taken_nothing(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    start().fall_idle()
    send(redis_url, range(3))
    # It has not come to read anything; BRPOP would have answered by now.
    assert server.llen("q") == 3
    assert calls(server, "brpop") == 0


def test_the_first_message_after_a_pause_is_held_as_it_is_taken(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    for number in range(5):
        worker.fall_idle()
        send(redis_url, [number])
        assert worker.read(number + 1)[-1] == number
    assert held(server) == tags(worker.reader)
    assert calls(server, "brpop") == 0


def test_an_idle_worker_probes_the_link_and_keeps_it(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    # So short that redis-py would ask for a sign of life itself, which a subscriber answers
    # otherwise.
    worker = start(transport_options={"health_check_interval": 0.01})
    worker.fall_idle()
    with looking_again(0.05):
        worker.reader.consumer.add_queue(Queue("other"))
        worker.reader.consumer.consume()
        before = calls(server, "ping")
        eventually(lambda: worker.turn() or calls(server, "ping") > before + 10, 10, 0)
    send(redis_url, [1])
    assert worker.read(1) == [1]


def test_messages_of_every_queue_and_priority_wake_it(start: Start, redis_url: str) -> None:
    worker = start("q", "other")
    sent = [("q", 0), ("other", 0), ("q", 9), ("other", 3)]
    for number, (queue, priority) in enumerate(sent):
        worker.fall_idle()
        send(redis_url, [number], queue=queue, priority=priority)
        assert worker.read(number + 1)[-1] == number


def test_an_idle_worker_asks_nothing(start: Start) -> None:
    worker = start()
    worker.fall_idle()
    asked = worker.asked()
    for _ in range(20):
        worker.turn()
    assert worker.asked() == asked


def test_a_queue_that_joins_is_looked_into_at_once(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    worker = start("q")
    send(redis_url, [1], queue="late")
    worker.fall_idle()
    worker.reader.consumer.add_queue(Queue("late"))
    worker.reader.consumer.consume()
    worker.turn()  # asks whether there are any
    assert worker.read(1) == [1]


def test_a_message_that_comes_while_it_asks_is_not_overlooked(start: Start, redis_url: str) -> None:
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
    worker.reader.consumer.add_queue(Queue("more"))  # it has not been looked into
    worker.reader.consumer.consume()
    worker.reader.ask()
    eventually(lambda: calls(server, "exists") > asked)


def test_what_is_told_before_the_answer_is_read_is_not_forgotten(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    ask_while_empty(worker, server)
    send(redis_url, [1])
    worker.hear()
    assert worker.read(1) == [1]
    worker.fall_idle()
    send(redis_url, [2])
    assert worker.read(2) == [1, 2]


def test_a_queue_that_joins_before_the_answer_is_read_is_looked_into(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    worker = start()
    send(redis_url, [1], queue="late")
    ask_while_empty(worker, server)
    worker.reader.consumer.add_queue(Queue("late"))
    worker.reader.consumer.consume()
    assert worker.read(1) == [1]


def test_a_queue_that_joins_when_the_server_has_lost_our_script_is_looked_into_at_once(
    start: Start, server: redis.Redis, redis_url: str
) -> None:
    worker = start("q")
    worker.fall_idle()
    server.script_flush()
    send(redis_url, [1], queue="late")
    worker.reader.consumer.add_queue(Queue("late"))
    worker.reader.consumer.consume()
    assert worker.read(1) == [1]


def test_answers_that_a_worker_waits_for_before_its_loop_runs_are_not_overlooked(
    start: Start, redis_url: str
) -> None:
    # As Celery's mingle does, at a worker's start.
    reader = start(no_ack=True).reader
    while reader.turn():
        pass
    send(redis_url, [1])
    eventually(lambda: reader.turn() or reader.messages, 5, 0)
    assert reader.numbers() == [1]


def test_a_full_window_wakes_no_worker_and_loses_nothing(start: Start, redis_url: str) -> None:
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
    start: Start,
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
    assert [one.getMessage()[:29] for one in caplog.records] == ["Redis refuses CLIENT TRACKING"]
    assert calls(server, "brpop") > 0


def test_a_link_that_is_cut_ends_the_connection(start: Start, server: redis.Redis) -> None:
    worker = start()
    worker.fall_idle()
    (link,) = [one for one in server.client_list() if one["name"] == "gw_celery-watch"]
    server.client_kill_filter(_id=link["id"])
    with pytest.raises(redis.ConnectionError):
        eventually(worker.turn, 10, 0)


def test_a_database_that_is_flushed_ends_at_most_the_connection(
    start: Start, server: redis.Redis, redis_url: str
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


def test_a_link_that_is_silent_ends_the_connection(
    start: Start, redis_url: str, tmp_path: Path
) -> None:
    with silencing(redis_url, str(tmp_path / "s")) as (url, is_silent), looking_again(0.05):
        worker = start(url=url)
        for _ in range(5):
            worker.turn()
        is_silent.set()
        with pytest.raises(redis.ConnectionError, match=r"did not answer for 0 s"):
            eventually(worker.turn, 10, 0)


def test_a_reading_connection_that_was_made_anew_is_followed_again(
    start: Start, redis_url: str
) -> None:
    worker = start()
    worker.fall_idle()
    worker.reader.channel.client.connection.disconnect()
    send(redis_url, [0])  # nothing tells of it
    assert worker.read(1) == [0]
    worker.fall_idle()
    send(redis_url, [1])
    assert worker.read(2) == [0, 1]


def test_nothing_is_left_of_it(server: redis.Redis, redis_url: str, hub: Hub) -> None:
    before = {one["id"] for one in server.client_list()}
    with reading(redis_url) as reader:
        worker = Worker(reader, hub, server)
        worker.fall_idle()
        (link,) = worker.links()
    assert link not in hub.readers
    eventually(lambda: {one["id"] for one in server.client_list()} <= before)
