"""Readers of a Redis broker that tests drive by hand, and what the server knows of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from kombu import Connection, Consumer, Queue

from gw_celery.transport import transport
from tests.processes import eventually


class Reader:
    """A consumer that is driven by hand and keeps what it gets."""

    def __init__(self, connection: Any, queues: list[Queue], **options: Any) -> None:
        self.connection = connection
        self.channel = connection.default_channel
        self.messages: list[Any] = []
        self.queues = queues
        prefetch = options.pop("prefetch", 0)
        self.consumer = Consumer(
            self.channel,
            queues,
            on_message=self.messages.append,
            prefetch_count=prefetch,
            **options,
        )
        self.consumer.consume()

    def turn(self, timeout: float = 0.05) -> bool:
        """Read once; False when nothing came."""
        try:
            self.connection.drain_events(timeout=timeout)
        except TimeoutError:
            return False
        return True

    def read(self, count: int) -> list[Any]:
        """Read until there are ``count`` messages in all."""
        eventually(lambda: (self.turn() and False) or len(self.messages) >= count, 20, 0)
        return self.messages

    def read_all(self) -> list[Any]:
        """Read until two turns bring nothing: an answer may be without a message."""
        while self.turn() or self.turn(0.2):
            pass
        return self.messages

    def numbers(self) -> list[Any]:
        return [json.loads(message.body)["n"] for message in self.messages]

    def ask(self) -> None:
        """Send the command that takes messages, and leave its answer unread."""
        self.connection.transport.cycle.on_poll_start()


@contextmanager
def reading(url: str, *queues: Queue | str, **options: Any) -> Iterator[Reader]:
    # A channel that closes waits for what it has asked: a second, by default.
    given = {"polling_interval": 0.05, **options.pop("transport_options", {})}
    connection = transport.use(Connection(url, transport_options=given))
    named = [Queue(name) if isinstance(name, str) else name for name in queues or ("q",)]
    reader = Reader(connection, named, **options)
    try:
        yield reader
    finally:
        connection.close()


@contextmanager
def stock(url: str, **options: Any) -> Iterator[Any]:
    """A channel of kombu's own transport, to which everything unacknowledged is overdue."""
    options = {"visibility_timeout": 0, **options}
    with Connection(url, transport_options=options) as connection:
        yield connection.default_channel


def send(url: str, numbers: Any, queue: str = "q", **options: Any) -> None:
    with Connection(url) as connection:
        producer = connection.Producer(serializer="json")
        for number in numbers:
            producer.publish({"n": number}, routing_key=queue, **options)


def calls(server: redis.Redis, command: str) -> int:
    """How often the server has run a command, in scripts too."""
    stats: dict[str, Any] = server.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


def unacknowledged(server: redis.Redis) -> set[str]:
    """The tags that are recorded, in the hash and in its index alike."""
    tags = {tag.decode() for tag in server.hkeys("unacked")}
    assert {tag.decode() for tag in server.zrange("unacked_index", 0, -1)} == tags
    return tags


def tags(reader: Reader) -> set[str]:
    return {message.delivery_tag for message in reader.messages}


def take_with_kombu(url: str, queue: str = "q") -> list[Any]:
    """What a stock consumer gets of everything that is overdue."""
    with stock(url) as channel:
        channel.qos.restore_visible(num=None)
        found = iter(lambda: channel.basic_get(queue, no_ack=True), None)
        return list(found)


def described(message: Any) -> dict[str, Any]:
    properties = {key: message.properties[key] for key in ("correlation_id", "priority")}
    headers = {key: value for key, value in message.headers.items() if key != "redelivered"}
    return {
        "body": bytes(message.body),
        "headers": headers,
        "tag": message.delivery_tag,
    } | properties


def foreign(**changes: Any) -> dict[str, Any]:
    """A message as a client of another language may write it."""
    properties = {
        "delivery_tag": "real",
        "delivery_info": {"exchange": "", "routing_key": "q"},
        "body_encoding": "utf-8",
    }
    rest = {"body": '{"n": "foreign"}', "content-type": "application/json"}
    return {"properties": properties, **rest, "content-encoding": "utf-8", "headers": {}, **changes}
