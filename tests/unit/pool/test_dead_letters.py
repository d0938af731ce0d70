from __future__ import annotations

import json
import re
import threading
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from gw_celery import conf
from gw_celery.pool import dead_letters
from tests.processes import eventually
from tests.unit.test_cli import gw

SETTINGS = conf.Settings(max_dead_letters=2, store_timeout=30.0)
FACTS: dict[str, Any] = {
    "reason": "it killed",
    "since": "2026-01-02T03:04:05+00:00",
    "worker": "w@h",
    "deaths": 3,
}


class Queue:
    """A dead-letter queue that can be away, or hang."""

    def __init__(self) -> None:
        self.held: list[dict[str, Any]] = []
        self.tries = 0
        self.is_away = False
        self.is_free = threading.Event()
        self.is_free.set()

    def add(self, letter: dict[str, Any]) -> bool:
        self.tries += 1
        assert self.is_free.wait(30)
        if self.is_away:
            raise ConnectionError("away")
        if len(self.held) >= 2:
            return False
        self.held.append(letter)
        return True


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(dead_letters, "queue_of", lambda *_: queue)
    monkeypatch.setattr(dead_letters, "_PAUSE", 0.01)
    return queue


@pytest.fixture
def writer(queue: Queue) -> Iterator[dead_letters.DeadLetters]:
    with Celery("dead", broker="memory://", set_as_current=False) as app:
        writer = dead_letters.DeadLetters(app, SETTINGS, "w@h")
        yield writer
        queue.is_free.set()
        writer.close()


def message(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "body": b"[[1], {}, null]",
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "headers": {"id": "a", "task": "proj.embed", "mine": "kept"},
            "properties": {"priority": 3, "reply_to": "r", "correlation_id": "a"},
            "delivery_info": {"exchange": "", "routing_key": "gpu.embed", "redelivered": True},
            **changes,
        }
    )


def request(task_id: str) -> Any:
    sent = message(headers={"id": task_id, "task": "proj.embed"})
    return SimpleNamespace(message=sent, name="proj.embed", task_id=task_id)


# -- the two conversions --


def test_a_dead_letter_is_the_message_with_why_when_where_and_how_often() -> None:
    sent = message()
    letter = dead_letters.to_dead_letter(sent, **FACTS)
    assert letter == {
        "body": sent.body,
        "priority": 3,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": {
            **sent.headers,
            "gw-dead-reason": "it killed",
            "gw-dead-since": "2026-01-02T03:04:05+00:00",
            "gw-dead-worker": "w@h",
            "gw-dead-deaths": 3,
            "gw-dead-exchange": "",
            "gw-dead-routing-key": "gpu.embed",
        },
        "properties": {"reply_to": "r", "correlation_id": "a"},
    }
    delivered = message(headers=letter["headers"])
    assert dead_letters.summary(delivered) == {
        "id": "a",
        "task": "proj.embed",
        "queue": "gpu.embed",
        **FACTS,
    }


def test_what_is_sent_again_is_what_was_sent_first_with_no_deaths() -> None:
    sent = message()
    sent.headers |= {"x-delivery-count": 4, "gw-enqueued": 1.0, "x-death": [{"count": 1}]}
    letter = dead_letters.to_dead_letter(sent, **FACTS)
    again = dead_letters.to_message(message(headers=letter["headers"]))
    assert again["headers"] == {
        "id": "a",
        "task": "proj.embed",
        "mine": "kept",
        "gw-requeued": True,
    }
    assert {**again, "headers": None} == {**letter, "headers": None}


def test_a_compressed_body_is_compressed_again_for_its_headers_say_so() -> None:
    sent = message(headers={"id": "a", "compression": "application/x-gzip"})
    assert zlib.decompress(dead_letters.to_dead_letter(sent, **FACTS)["body"]) == sent.body
    assert zlib.decompress(dead_letters.to_message(sent)["body"]) == sent.body


def test_what_the_broker_would_act_on_stays_behind() -> None:
    sent = message(properties={"expiration": "1000", "user_id": "guest", "delivery_tag": 1})
    assert dead_letters.to_dead_letter(sent, **FACTS)["properties"] == {}


def test_a_long_reason_is_cut_for_headers_have_a_limit() -> None:
    letter = dead_letters.to_dead_letter(message(), **{**FACTS, "reason": "x" * 10**6})
    assert len(letter["headers"]["gw-dead-reason"]) == 1000


# -- the thread that writes them --


def test_a_dead_letter_has_the_worker_the_reason_and_the_deaths(
    writer: dead_letters.DeadLetters, queue: Queue
) -> None:
    writer.keep(request("a"), "it killed", 3)
    eventually(lambda: queue.held)
    added = queue.held[0]["headers"]
    assert (added["gw-dead-worker"], added["gw-dead-reason"], added["gw-dead-deaths"]) == (
        "w@h",
        "it killed",
        3,
    )


def test_keeping_never_waits_for_a_broker_that_hangs(
    writer: dead_letters.DeadLetters, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    queue.is_free.clear()
    for number in range(dead_letters._MAX_WAITING + 1):
        writer.keep(request(f"n{number}"), "", 3)
    assert "[n100] has no dead letter: 100 others wait for the broker" in caplog.text
    writer.close(0.2)
    for number in range(dead_letters._MAX_WAITING):
        assert f"task proj.embed[n{number}] has no dead letter: the worker ends" in caplog.text


def test_the_end_of_a_worker_waits_for_what_can_be_written(
    writer: dead_letters.DeadLetters, queue: Queue
) -> None:
    for name in "ab":
        writer.keep(request(name), "", 3)
    writer.close()
    assert [letter["headers"]["id"] for letter in queue.held] == ["a", "b"]


def test_a_dead_letter_is_tried_again_while_the_broker_is_away(
    writer: dead_letters.DeadLetters, queue: Queue
) -> None:
    queue.is_away = True
    writer.keep(request("a"), "", 3)
    eventually(lambda: queue.tries > 2)
    queue.is_away = False
    (letter,) = eventually(lambda: queue.held)
    assert letter["headers"]["id"] == "a"


def test_a_full_queue_is_one_line_with_the_task_and_the_remedy(
    writer: dead_letters.DeadLetters, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        writer.keep(request(name), "", 3)
    eventually(lambda: "is full" in caplog.text)
    (line,) = [text for text in caplog.messages if "is full" in text]
    assert "proj.embed[c]" in line
    assert "gw_max_dead_letters" in line
    assert "gw dead --requeue" in line


def test_a_message_that_cannot_be_read_costs_only_its_dead_letter(
    writer: dead_letters.DeadLetters, caplog: pytest.LogCaptureFixture
) -> None:
    broken = request("a")
    broken.message.headers = {"compression": "no such"}
    writer.keep(broken, "", 3)
    assert "task proj.embed[a] has no dead letter" in caplog.text


# -- sending again, on Redis --


@pytest.fixture
def redis_app(redis_url: str) -> Iterator[Celery]:
    with Celery("dead", broker=redis_url, set_as_current=False) as app:
        app.conf.update(task_create_missing_queues=False, task_queues=[])
        yield app


def test_of_two_that_send_one_again_only_one_does(
    redis_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dead_letters.connect(redis_app) as here, dead_letters.connect(redis_app) as there:
        first, second = (dead_letters.queue_of(redis_app, each, SETTINGS) for each in (here, there))
        first.add(dead_letters.to_dead_letter(message(), **FACTS))
        read = first._stored

        def stored() -> Iterator[Any]:
            for letter in read():
                assert second.requeue("a") is not None
                yield letter

        monkeypatch.setattr(first, "_stored", stored)
        assert first.requeue("a") is None
        assert sum(sizes(here)) == 1
        assert list(second.read()) == []


def test_what_is_sent_again_needs_no_queue_that_is_named(redis_app: Celery) -> None:
    with dead_letters.connect(redis_app) as connection:
        queue = dead_letters.queue_of(redis_app, connection, SETTINGS)
        queue.add(dead_letters.to_dead_letter(message(), **FACTS))
        assert queue.requeue("a") is not None
        assert sizes(connection) == [0, 1, 0, 0], "by its priority"


def sizes(connection: Any) -> list[int]:
    """The messages in each list of ``gpu.embed``, by rising number of the priority."""
    channel = connection.default_channel
    lists = [channel._q_for_pri("gpu.embed", step) for step in channel.priority_steps]
    return [channel.client.llen(name) for name in lists]


# -- what else may lie in the queue --

GARBAGE = [
    b"garbage",
    b"\xff\xfe\x00",
    b"[]",
    b"null",
    b'"text"',
    b"[" * 100_000,
    b'{"headers": 5, "body": "", "properties": {"delivery_tag": "1"}}',
    b'{"headers": {"id": {}, "task": []}, "body": "", "properties": {"delivery_tag": "1"}}',
]


@pytest.fixture(params=["redis", "rabbitmq"])
def operator(request: pytest.FixtureRequest) -> Iterator[Celery]:
    """An app on each kind of broker, with a dead letter between entries that are none."""
    url = request.getfixturevalue(f"{request.param}_url")
    with Celery("dead", broker=url, set_as_current=False) as app:
        with dead_letters.connect(app) as connection:
            queue = dead_letters.queue_of(app, connection, conf.read(app.conf))
            add_garbage(connection)
            odd = {"id": "a\x1b[2J", "task": "proj.embed\nforged", "gw-dead-worker": "w"}
            for sent in (message(), message(headers=odd)):
                queue.add(dead_letters.to_dead_letter(sent, **FACTS))
            add_garbage(connection)
        yield app


def add_garbage(connection: Any) -> None:
    """Write into the queue what is no dead letter, in the forms that its broker allows."""
    channel = connection.default_channel
    if connection.transport.driver_type == "redis":
        channel.client.lpush("gw.dead", *GARBAGE)
        return
    channel.queue_declare(
        "gw.dead",
        durable=True,
        auto_delete=False,
        passive=False,
        arguments={"x-max-length": 1000, "x-overflow": "reject-publish"},
    )
    for about in ({}, {"id": {}, "task": 1}, {"compression": "bzip2"}, {"compression": "none"}):
        sent = channel.prepare_message(b"\xff\x00", headers={"id": "b", "task": "c", **about})
        channel.basic_publish(sent, exchange="", routing_key="gw.dead")


def test_entries_that_are_no_dead_letters_are_counted_and_skipped(operator: Celery) -> None:
    result = gw("dead", operator)
    assert result.exit_code == 0, result.exception
    assert "gw.dead: 2 dead letters" in result.output
    assert re.search(r"\d+ entries of gw.dead are skipped", result.output)
    assert json.loads(gw("dead --json", operator).stdout)[0]["id"] == "a"
    assert "\x1b" not in result.output
    assert "a\\x1b[2J  proj.embed\\nforged" in result.output
    assert gw("dead --requeue a", operator).exit_code == 0
    again = gw("dead", operator)
    assert "gw.dead: 1 dead letters" in again.output
    assert "entries of gw.dead are skipped" in again.output, "what is not ours stays"
    assert gw("dead --requeue b", operator).exit_code == 1
