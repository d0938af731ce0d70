"""Readers of a Redis broker that tests drive by hand, and what the server knows of them.

``reading`` gives a consumer over the connection that a worker with the GPU pool has; ``Worker``
puts one on a worker's event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub

# -- what is known of the inside: a new layout changes these lines and no others --
from gw_celery.transport import holds, transport
from tests.processes import eventually

_starts = itertools.count(1)


def new_holds() -> holds.Holds:
    """Return the holds of another worker."""
    return holds.Holds(f"reader{next(_starts)}@host:1", 15.0)


def connect(url: str, held_by: holds.Holds | None = None, **options: Any) -> Any:
    """Return a connection of kombu as the consumer of a worker has it; not connected yet.

    Args:
        url: of the broker.
        held_by: holds of a worker that connects again; without them, another worker connects.
        options: of the connection.
    """
    return transport.use(Connection(url, **options), held_by or new_holds())


def tombstone(reader: Reader) -> str:
    """Return the key that exists once a reader's worker was declared lost."""
    return holds.tombstone(reader.channel.global_keyprefix, reader.holds.incarnation)


def holds_key(reader: Reader) -> str:
    """Return the key of the holds of a reader's worker."""
    return holds.key(reader.channel.global_keyprefix, reader.holds.incarnation)


def held(server: redis.Redis, prefix: str = "") -> set[str]:
    """Return the names of all holds that Redis keeps."""
    start, keys = f"{prefix}gw:hold:", server.scan_iter(f"{prefix}gw:hold:*")
    return {
        f"{key.decode().removeprefix(start)}/{number.decode()}"
        for key in keys
        for number in server.hkeys(key)
    }


def reclaim(server: redis.Redis, reader: Reader) -> int:
    """Give back what a killed worker held, as the worker that declares it lost does."""
    key = holds_key(reader)
    return holds.give_back(server, key, holds.numbers_of(server, key), is_lost=True)


@contextmanager
def asking_again(seconds: float) -> Iterator[None]:
    """Have a Redis that refused a command asked again after this time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "PAUSE", seconds)
        yield


@contextmanager
def looking_again(seconds: float) -> Iterator[None]:
    """Have idle workers read their lists again so often, without having been told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "LOOK_AGAIN", seconds)
        yield


# -- readers --


class Reader:
    """A consumer that is driven by hand and keeps what it gets."""

    def __init__(self, connection: Any, queues: list[Queue], **options: Any) -> None:
        self.connection = connection
        self.holds: holds.Holds = connection.holds
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


class Worker:
    """A reader on the event loop of a worker, one turn at a time."""

    def __init__(self, reader: Reader, hub: Hub, server: redis.Redis) -> None:
        self.reader = reader
        self.hub = hub
        self.server = server
        reader.connection.register_with_event_loop(hub)

    def turn(self) -> bool:
        self.hub.call_later(0.02, lambda: None)  # what bounds the turn
        self.hub.run_once()
        return False

    def asked(self) -> int:
        """How often the server was asked for messages, or whether there are any."""
        return sum(calls(self.server, name) for name in ("exists", "evalsha", "brpop"))

    def fall_idle(self) -> None:
        """Take turns until several of them ask nothing."""

        def is_idle() -> bool:
            before = self.asked()
            for _ in range(3):
                self.turn()
            return self.asked() == before > 0

        eventually(is_idle, 10, 0)

    def read(self, count: int) -> list[Any]:
        eventually(lambda: self.turn() or len(self.reader.messages) >= count, 10, 0)
        return self.reader.numbers()

    def links(self) -> list[int]:
        """The file descriptors on which Redis tells of changes."""
        return [
            fd for fd in self.hub.readers if fd not in self.reader.connection.transport.cycle.fds
        ]

    def hear(self) -> None:
        """Read what Redis tells of changes, and nothing else."""
        for fd in self.links():
            callback, args = self.hub.readers[fd]
            callback(*args)


@contextmanager
def reading(
    url: str, *queues: Queue | str, held_by: holds.Holds | None = None, **options: Any
) -> Iterator[Reader]:
    # A channel that closes waits for what it has asked: a second, by default.
    given = {"polling_interval": 0.05, **options.pop("transport_options", {})}
    connection = connect(url, held_by, transport_options=given)
    named = [Queue(name) if isinstance(name, str) else name for name in queues or ("q",)]
    reader = Reader(connection, named, **options)
    try:
        yield reader
    finally:
        connection.close()


@contextmanager
def silencing(url: str, path: str) -> Iterator[tuple[str, threading.Event]]:
    """Stand between workers and a server; while the event is set, it tells of no changes.

    Args:
        url: of the server.
        path: for a socket; the URL of it is what workers connect to.
    """
    is_silent, started, stop = threading.Event(), threading.Event(), asyncio.Event()
    socket = url.removeprefix("redis+socket://").partition("?")[0]
    loops: list[asyncio.AbstractEventLoop] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(socket)
        is_told = asyncio.Event()

        async def ask() -> None:
            while data := await reader.read(65536):
                if b"__redis__:invalidate" in data:
                    is_told.set()
                to_server.write(data)
            to_server.close()

        async def answer() -> None:
            while data := await from_server.read(65536):
                if not (is_told.is_set() and is_silent.is_set()):
                    writer.write(data)

        try:
            await asyncio.gather(ask(), answer())
        finally:
            to_server.close()
            writer.close()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with await asyncio.start_unix_server(accept, path):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield url.replace(socket, path), is_silent
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)


@contextmanager
def stock(url: str, **options: Any) -> Iterator[Any]:
    """A channel of kombu's own transport, to which everything unacknowledged is overdue."""
    options = {"visibility_timeout": 0, **options}
    with Connection(url, transport_options=options) as connection:
        yield connection.default_channel


def send(
    url: str,
    numbers: Any,
    queue: str = "q",
    transport_options: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    with Connection(url, transport_options=transport_options or {}) as connection:
        producer = connection.Producer(serializer="json")
        for number in numbers:
            producer.publish({"n": number}, routing_key=queue, **options)


def calls(server: redis.Redis, command: str) -> int:
    """How often the server has run a command, in scripts too."""
    stats: dict[str, Any] = server.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


def tags(reader: Reader) -> set[str]:
    return {message.delivery_tag for message in reader.messages}


def take_with_kombu(url: str, queue: str = "q") -> list[Any]:
    """What a stock consumer gets."""
    with stock(url) as channel:
        found = iter(lambda: channel.basic_get(queue, no_ack=True), None)
        return list(found)


def described(message: Any) -> dict[str, Any]:
    properties = {key: message.properties[key] for key in ("correlation_id", "priority")}
    counted = ("redelivered", "gw-deliveries")
    headers = {key: value for key, value in message.headers.items() if key not in counted}
    return {"body": bytes(message.body), "headers": headers} | properties


def foreign(**changes: Any) -> dict[str, Any]:
    """A message as a client of another language may write it."""
    properties = {
        "delivery_tag": "real",
        "delivery_info": {"exchange": "", "routing_key": "q"},
        "body_encoding": "utf-8",
    }
    rest = {"body": '{"n": "foreign"}', "content-type": "application/json"}
    return {"properties": properties, **rest, "content-encoding": "utf-8", "headers": {}, **changes}
