"""How many messages wait in the broker for each service, read over a connection of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from gw_celery.transport import broker

#: Seconds that the broker has to answer: a thread that waits without an end would be blind.
_ANSWER = 10.0
#: What bounds its answers, by the transport's kind.
_BOUNDS = {"redis": ("socket_timeout", "socket_connect_timeout"), "amqp": ("read_timeout",)}


@dataclasses.dataclass(frozen=True)
class Length:
    """Messages that wait in the queues of one service."""

    messages: int
    #: Workers that consume them now; ``None`` where the broker does not tell.
    consumers: int | None = None


class Unreadable:
    """A transport that does not tell how long a queue is."""

    def read(self) -> dict[str, Length] | None:
        return None


class RedisLengths:
    """The lists of each queue: one for each priority.

    Args:
        channel: a channel of kombu's Redis transport, which knows the names of the lists.
        client: writes no prefix before keys.
    """

    def __init__(self, channel: Any, client: Any, queues: Mapping[str, Sequence[str]]) -> None:
        self._client = client
        prefix, steps = channel.global_keyprefix, channel.priority_steps
        self._lists = [
            (service, f"{prefix}{channel._q_for_pri(queue, step)}")
            for service, names in queues.items()
            for queue in names
            for step in steps
        ]

    def read(self) -> dict[str, Length]:
        """Ask for all of them in one round trip."""
        with self._client.pipeline(transaction=False) as pipe:
            for _, key in self._lists:
                pipe.llen(key)
            counted = pipe.execute()
        sums: dict[str, int] = {}
        for (service, _), count in zip(self._lists, counted, strict=True):
            sums[service] = sums.get(service, 0) + int(count)
        return {service: Length(count) for service, count in sums.items()}


class DeclaredLengths:
    """Queues of RabbitMQ, of whatever type: a passive declaration tells, and changes nothing.

    It counts what is ready, not what consumers hold.
    """

    def __init__(self, connection: Any, queues: Mapping[str, Sequence[str]]) -> None:
        self._connection = connection
        self._queues = queues
        self._channel: Any = None

    def read(self) -> dict[str, Length]:
        found = {}
        for service, names in self._queues.items():
            each = [self._read(name) for name in names]
            consumers = max((one.consumers or 0 for one in each), default=0)
            found[service] = Length(sum(one.messages for one in each), consumers)
        return found

    def _read(self, name: str) -> Length:
        if self._channel is None:
            self._channel = self._connection.channel()
        try:
            declared = self._channel.queue_declare(queue=name, passive=True)
        except self._connection.channel_errors as exc:
            # The broker has closed the channel, so that the next queue needs another.
            channel, self._channel = self._channel, None
            with contextlib.suppress(*self._connection.channel_errors, OSError):
                channel.close()
            if getattr(exc, "reply_code", None) != _NOT_FOUND:
                raise
            return Length(0, 0)
        return Length(int(declared.message_count), int(declared.consumer_count))


#: What AMQP answers about a queue that nobody has declared.
_NOT_FOUND = 404


class Reader:
    """Reads over a connection that it makes at the first reading, and after each failed one."""

    def __init__(self, app: Any, queues: Mapping[str, Sequence[str]]) -> None:
        self._app = app
        self._queues = queues
        self._connection: Any = None
        self._lengths: Any = None

    def read(self) -> dict[str, Length] | None:
        """Return the lengths by service; ``None`` where the transport does not tell."""
        try:
            if self._lengths is None:
                self._connection = connect(self._app)
                self._lengths = of(self._connection, self._queues)
            read: dict[str, Length] | None = self._lengths.read()
            return read
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        connection, self._connection, self._lengths = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.release()


def connect(app: Any) -> Any:
    """Return a new connection to the broker of ``app``, which gives up one that is silent."""
    connection = app.connection_for_read()
    for name in _BOUNDS.get(connection.get_transport_cls().driver_type, ()):
        connection.transport_options.setdefault(name, _ANSWER)
    try:
        # Not by way of its default channel, which would try for ever.
        connection.connect()
    except BaseException:
        with contextlib.suppress(Exception):
            connection.release()
        raise
    return connection


def of(connection: Any, queues: Mapping[str, Sequence[str]]) -> Any:
    """Return what reads the lengths of ``queues``, which are listed by service."""
    if broker.redis_transport(connection) is not None:
        channel = connection.default_channel
        return RedisLengths(channel, plain_client(channel), queues)
    if connection.transport.driver_type == "amqp":
        return DeclaredLengths(connection, queues)
    return Unreadable()


def plain_client(channel: Any) -> Any:
    """Return a client over the connections of a channel, for keys that have their prefix.

    kombu's own puts it before keys, but not for all commands.
    """
    return redis.Redis(connection_pool=channel.client.connection_pool)
