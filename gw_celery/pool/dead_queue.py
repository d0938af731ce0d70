"""The dead-letter queue in the broker: add to it up to its bound, look into it, send one again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from amqp.exceptions import MessageNacked
from kombu.entity import Queue
from kombu.utils import json

from gw_celery.pool import dead_letter_message
from gw_celery.transport import broker

#: Seconds that RabbitMQ has to confirm a message.
_CONFIRM_TIMEOUT = 10.0
#: Letters that are read from Redis at a time.
_PAGE = 20

# Scripts, because each is one decision, and because kombu's client, which puts a prefix before
# keys, does not do so for all the commands in them.
_ADD = """
if redis.call('LLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[2])
return 1
"""
_LOOK = "return redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])"
_REQUEUE = """
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return 0 end
for i = 2, #KEYS do redis.call('LPUSH', KEYS[i], ARGV[2]) end
return 1
"""


class DeadQueue(Protocol):
    """A queue of dead letters that never holds more than its bound."""

    def add(self, letter: dead_letter_message.Letter) -> bool:
        """Put a letter into the queue; False when it is full."""
        ...

    def look(self) -> Iterator[dead_letter_message.Letter]:
        """Yield what lies there, the oldest first; it stays."""
        ...

    def requeue(self, task_id: str) -> dead_letter_message.Letter | None:
        """Send one again to where it came from, and take it out; None when it is not there."""
        ...


def of(app: Any, connection: Any, name: str, most: int) -> DeadQueue:
    """Return the queue ``name`` of ``most`` letters, over ``connection``, which is the caller's."""
    if broker.redis_transport(connection) is not None:
        return RedisQueue(connection, name, most)
    return BrokerQueue(app, connection, name, most)


def connect(app: Any) -> Any:
    """Return a connection of one's own, over which RabbitMQ confirms what it has taken."""
    return app.connection_for_write(transport_options={"confirm_publish": True})


class RedisQueue:
    """One list, in kombu's format, whatever the priorities of its letters."""

    def __init__(self, connection: Any, name: str, most: int) -> None:
        self._connection = connection
        self._name = name
        self._most = most

    def add(self, letter: dead_letter_message.Letter) -> bool:
        written = self._written(letter, "", self._name)
        return bool(self._run(_ADD, [self._name], self._most, written))

    def look(self) -> Iterator[dead_letter_message.Letter]:
        return (letter for letter, _ in self._read())

    def requeue(self, task_id: str) -> dead_letter_message.Letter | None:
        channel = self._connection.default_channel
        for letter, raw in self._read():
            if letter.task_id != task_id:
                continue
            alive, exchange, key = (
                dead_letter_message.revive(letter),
                letter.exchange,
                letter.routing_key,
            )
            queues = channel._lookup(exchange, key) if exchange else [key]
            priority = channel._get_message_priority({"properties": alive.properties})
            lists = [channel._q_for_pri(queue, priority) for queue in queues]
            written = self._written(alive, exchange, key)
            if self._run(_REQUEUE, [self._name, *lists], raw, written):
                return alive
        return None

    def _read(self) -> Iterator[tuple[dead_letter_message.Letter, bytes]]:
        """The oldest are at the end: what is added meanwhile moves none of them."""
        channel = self._connection.default_channel
        for end in range(1, self._most + 1, _PAGE):
            page = self._run(_LOOK, [self._name], -end - _PAGE + 1, -end)
            for raw in reversed(page):
                yield (
                    dead_letter_message.read(channel.Message(json.loads(raw), channel=channel)),
                    raw,
                )
            if len(page) < _PAGE:
                return

    def _written(self, letter: dead_letter_message.Letter, exchange: str, routing_key: str) -> str:
        channel = self._connection.default_channel
        message = _prepared(channel, letter)
        channel._inplace_augment_message(message, exchange, routing_key)
        written: str = json.dumps(message)
        return written

    def _run(self, script: str, keys: list[str], *arguments: Any) -> Any:
        channel = self._connection.default_channel
        named = [f"{channel.global_keyprefix}{key}" for key in keys]
        return channel.client.eval(script, len(named), *named, *arguments)


class BrokerQueue:
    """A queue of RabbitMQ, which keeps the bound itself, or of any other broker of kombu's."""

    def __init__(self, app: Any, connection: Any, name: str, most: int) -> None:
        self._app = app
        self._connection = connection
        self._name = name
        self._most = most

    def add(self, letter: dead_letter_message.Letter) -> bool:
        if self._declare() >= self._most:
            return False
        try:
            with self._channel() as channel:
                self._publish(channel, letter, "", self._name)
        except MessageNacked:
            return False  # other workers have filled it meanwhile
        return True

    def look(self) -> Iterator[dead_letter_message.Letter]:
        with self._channel() as channel:
            for message in self._messages(channel):
                yield dead_letter_message.read(message)

    def requeue(self, task_id: str) -> dead_letter_message.Letter | None:
        with self._channel() as channel:
            for message in self._messages(channel):
                letter = dead_letter_message.read(message)
                if letter.task_id == task_id:
                    alive = dead_letter_message.revive(letter)
                    if not letter.exchange:  # as any sender does: it may have been deleted
                        self._app.amqp.queues[letter.routing_key](channel).declare()
                    self._publish(channel, alive, letter.exchange, letter.routing_key)
                    message.ack()
                    return alive
        return None

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Any]:
        """A channel of its own: what it took and did not acknowledge goes back when it closes."""
        channel = self._connection.channel()
        try:
            yield channel
        finally:
            with contextlib.suppress(*self._connection.channel_errors, OSError):
                channel.close()

    def _declare(self) -> int:
        """Make the queue where it is missing; returns how many letters it has."""
        bound = {"x-max-length": self._most, "x-overflow": "reject-publish"}
        try:
            with self._channel() as channel:
                declared = channel.queue_declare(
                    queue=self._name, durable=True, auto_delete=False, arguments=bound
                )
                return int(declared.message_count)
        except self._connection.channel_errors:
            # It is there with another bound, which the broker keeps; ours is counted.
            with self._channel() as channel:
                return self._count(channel)

    def _count(self, channel: Any) -> int:
        return int(channel.queue_declare(queue=self._name, passive=True).message_count)

    def _messages(self, channel: Any) -> Iterator[Any]:
        try:
            count = self._count(channel)
        except self._connection.channel_errors:
            return  # there never was a dead letter
        queue: Any = Queue(self._name, channel=channel)
        for _ in range(count):
            message = queue.get(no_ack=False)
            if message is None:
                return
            yield message

    def _publish(
        self, channel: Any, letter: dead_letter_message.Letter, exchange: str, routing_key: str
    ) -> None:
        options: dict[str, Any] = {}
        if self._connection.transport.driver_type == "amqp":
            options["confirm_timeout"] = _CONFIRM_TIMEOUT
        message = _prepared(channel, letter)
        channel.basic_publish(message, exchange=exchange, routing_key=routing_key, **options)


def _prepared(channel: Any, letter: dead_letter_message.Letter) -> Any:
    properties = dict(letter.properties)
    priority = properties.pop("priority", None)
    return channel.prepare_message(
        letter.body,
        priority=priority,
        content_type=letter.content_type,
        content_encoding=letter.content_encoding,
        headers=dict(letter.headers),
        properties=properties,
    )
