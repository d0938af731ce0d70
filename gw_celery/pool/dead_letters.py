"""Dead letters: messages that a worker gave up, kept in a bounded queue for operators.

A thread of the worker's parent writes them, because an unreachable broker blocks. The failed task
is answered in any case. ``celery gw dead`` reads them. "Fields" are the arguments of
``prepare_message`` of a kombu channel.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

from amqp.exceptions import MessageNacked
from kombu import compression
from kombu.utils import json

from gw_celery import background_thread, conf, errors
from gw_celery.pool import requests
from gw_celery.protocol import headers
from gw_celery.transport import find

logger = logging.getLogger(__name__)

_ADDED = "gw-dead-"
#: Headers to remove: the broker would read its own as the history of the new message, and the time
#: in the dead-letter queue must not count as queue time.
_PAST = {
    *("x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason"),
    *("x-delivery-count", "x-acquired-count", headers.ENQUEUED),
}
#: Properties of the sender to keep. Not ``expiration``, after which the broker would drop the dead
#: letter, nor ``user_id``, which it compares with the publishing user.
_PROPERTIES = {
    *("app_id", "cluster_id", "correlation_id", "delivery_mode"),
    *("message_id", "reply_to", "timestamp", "type"),
}
#: Maximum dead letters that wait for the broker.
_MAX_WAITING = 100
#: Seconds between two attempts to write.
_PAUSE = 1.0
#: Seconds that RabbitMQ may take to confirm a message.
_CONFIRM_TIMEOUT = 10.0
#: Dead letters per read from Redis.
_PAGE = 20

# Scripts, because adding and moving must be atomic, and because kombu's client adds the key prefix
# to some commands only.
_ADD = """
if redis.call('LLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[2])
return 1
"""
_READ = "return redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])"
_MOVE = """
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return 0 end
for i = 2, #KEYS do redis.call('LPUSH', KEYS[i], ARGV[2]) end
return 1
"""


def to_dead_letter(
    message: Any, *, reason: str, since: str, worker: str, deaths: int
) -> dict[str, Any]:
    """Return the fields of the dead letter for a message.

    Args:
        message: the message, as kombu delivered it.
        reason: why it was given up.
        since: the time of that, in ISO 8601.
        worker: node name of the worker that gave it up.
        deaths: number of children that died while the input ran alone.
    """
    delivery = message.delivery_info or {}
    facts = {
        "reason": errors.cut(reason),
        "since": since,
        "worker": worker,
        "deaths": deaths,
        "exchange": delivery.get("exchange") or "",
        "routing-key": delivery.get("routing_key") or "",
    }
    added = {_ADDED + name: value for name, value in facts.items()}
    return _fields(message, {**message.headers, **added})


def to_message(letter: Any) -> dict[str, Any]:
    """Return the fields of the original message to send again, without deaths."""
    kept = {
        name: value
        for name, value in letter.headers.items()
        if not name.startswith(_ADDED) and name not in _PAST
    }
    return _fields(letter, {**kept, headers.REQUEUED: True})


def summary(letter: Any) -> dict[str, Any]:
    facts = ("deaths", "since", "worker", "reason")
    return {
        "id": letter.headers.get("id"),
        "task": letter.headers.get("task"),
        "queue": letter.headers.get(f"{_ADDED}routing-key"),
        **{name: letter.headers.get(_ADDED + name) for name in facts},
    }


def _is_letter(message: Any) -> bool:
    """Return whether a message has what ``to_dead_letter`` adds, by which it is sent again."""
    if message is None or message.errors or not isinstance(message.headers, dict):
        return False
    names = ("id", "task", f"{_ADDED}exchange", f"{_ADDED}routing-key")
    return all(isinstance(message.headers.get(name), str) for name in names)


def _fields(message: Any, sent_headers: dict[str, Any]) -> dict[str, Any]:
    body, method = message.body, message.headers.get("compression")
    if method:  # kombu delivers the body decompressed
        body, _ = compression.compress(body, method)
    properties = message.properties
    return {
        "body": body,
        "priority": properties.get("priority"),
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": sent_headers,
        "properties": {name: properties[name] for name in _PROPERTIES & properties.keys()},
    }


def connect(app: Any) -> Any:
    """Return a new connection, on which RabbitMQ confirms each message."""
    return app.connection_for_write(transport_options={"confirm_publish": True})


def queue_of(app: Any, connection: Any, settings: conf.Settings) -> DeadLetterQueue:
    """Return the dead-letter queue of ``settings``, over the caller's ``connection``."""
    is_redis = find.redis_transport(connection) is not None
    return (RedisQueue if is_redis else DeadLetterQueue)(app, connection, settings)


class DeadLetterQueue:
    """A queue that RabbitMQ bounds; on other brokers of kombu, we only count its messages."""

    def __init__(self, app: Any, connection: Any, settings: conf.Settings) -> None:
        self._app = app
        self._connection = connection
        self._name = str(settings.dead_letter_queue)
        self._limit = settings.max_dead_letters
        #: Entries that were skipped, because they are not dead letters.
        self.unreadable = 0

    def add(self, letter: dict[str, Any]) -> bool:
        """Add a dead letter; return False if the queue is full."""
        bound = {"x-max-length": self._limit, "x-overflow": "reject-publish"}
        # The broker refuses if the queue exists with another bound; then only our count applies.
        with contextlib.suppress(*self._connection.channel_errors), self._channel() as channel:
            channel.queue_declare(
                queue=self._name, durable=True, auto_delete=False, arguments=bound
            )
        with self._channel() as channel:
            declared = channel.queue_declare(queue=self._name, passive=True)
            if declared.message_count >= self._limit:
                return False
            try:
                self._publish(channel, letter, "", self._name)
            except MessageNacked:  # other workers have filled the queue
                return False
        return True

    def read(self) -> Iterator[Any]:
        """Yield the dead letters as kombu delivers them, oldest first, without removing them."""
        return (letter for letter, _ in self._letters())

    def requeue(self, task_id: str) -> Any | None:
        """Move a dead letter back to its original queue; return None if it does not exist."""
        for letter, stored in self._letters():
            if letter.headers["id"] == task_id:
                names = (f"{_ADDED}exchange", f"{_ADDED}routing-key")
                exchange, key = (letter.headers.get(name) or "" for name in names)
                if self._move(stored, to_message(letter), exchange, key):
                    return letter
        return None

    def _channel(self) -> contextlib.closing[Any]:
        """Return a new channel; closing it returns the messages that were not acknowledged."""
        return contextlib.closing(self._connection.channel())

    def _move(self, stored: Any, fields: dict[str, Any], exchange: str, key: str) -> bool:
        """Replace a dead letter by a message; return False if another client removed it."""
        with self._channel() as channel:
            if not exchange:  # declare it: the queue may have been deleted
                self._app.amqp.queues[key](channel).declare()
            self._publish(channel, fields, exchange, key)
        stored.ack()
        return True

    def _letters(self) -> Iterator[tuple[Any, Any]]:
        """Yield each dead letter, and the handle of it that ``_move`` needs."""
        for letter, stored in self._stored():
            if _is_letter(letter):
                yield letter, stored
            else:
                self.unreadable += 1

    def _stored(self) -> Iterator[tuple[Any, Any]]:
        """Yield each entry and its handle; ``None`` for an entry that is not a message."""
        with self._channel() as channel:
            # kombu's ``Queue.get`` would raise for a body that it cannot decompress.
            to_python = getattr(channel, "message_to_python", lambda message: message)
            with contextlib.suppress(*self._connection.channel_errors):  # the queue does not exist
                while (message := channel.basic_get(self._name, no_ack=False)) is not None:
                    letter = to_python(message)
                    yield letter, letter

    def _publish(self, channel: Any, fields: dict[str, Any], exchange: str, key: str) -> None:
        is_amqp = self._connection.transport.driver_type == "amqp"
        options = {"confirm_timeout": _CONFIRM_TIMEOUT} if is_amqp else {}
        message = channel.prepare_message(**fields)
        channel.basic_publish(message, exchange=exchange, routing_key=key, **options)


class RedisQueue(DeadLetterQueue):
    """One Redis list in kombu's format, for dead letters of all priorities."""

    def add(self, letter: dict[str, Any]) -> bool:
        _, stored = self._prepared(letter, "", self._name)
        return bool(self._run(_ADD, [], self._limit, stored))

    def _move(self, stored: Any, fields: dict[str, Any], exchange: str, key: str) -> bool:
        channel = self._connection.default_channel
        priority, message = self._prepared(fields, exchange, key)
        lists = [channel._q_for_pri(name, priority) for name in channel._lookup(exchange, key)]
        return bool(self._run(_MOVE, lists, stored, message))

    def _stored(self) -> Iterator[tuple[Any, Any]]:
        channel = self._connection.default_channel
        for end in itertools.count(1, _PAGE):  # from the tail, which additions do not shift
            page = self._run(_READ, [], 1 - end - _PAGE, -end)
            for raw in reversed(page):
                try:
                    yield channel.Message(json.loads(raw), channel=channel), raw
                except Exception:  # anything may lie in a list
                    yield None, raw
            if len(page) < _PAGE:
                return

    def _prepared(self, fields: dict[str, Any], exchange: str, key: str) -> tuple[int, str]:
        """Return the priority of a message, and the message in kombu's stored form."""
        channel = self._connection.default_channel
        message = channel.prepare_message(**fields)
        channel._inplace_augment_message(message, exchange, key)
        return channel._get_message_priority(message), json.dumps(message)

    def _run(self, script: str, lists: list[str], *arguments: Any) -> Any:
        channel = self._connection.default_channel
        keys = [channel.global_keyprefix + name for name in (self._name, *lists)]
        return channel.client.eval(script, len(keys), *keys, *arguments)


class DeadLetters(background_thread.BackgroundThread):
    """The thread that writes a worker's dead letters; it starts with the first of them."""

    def __init__(self, app: Any, settings: conf.Settings, hostname: str) -> None:
        super().__init__("gw-dead-letters", "dead letters cannot be written", period=math.inf)
        self._app = app
        self._settings = settings
        self._hostname = hostname
        #: The first entry is being written.
        self._waiting: collections.deque[dict[str, Any]] = collections.deque()
        #: Monotonic time at which the first entry is given up; ``None`` before its first attempt.
        self._give_up_at: float | None = None

    def keep(self, given_up: requests.PoolRequest, reason: str, deaths: int) -> None:
        """Queue the message of an input that was given up, for writing."""
        if given_up.message is None:
            return
        since = self._app.now().isoformat(timespec="seconds")
        try:
            letter = to_dead_letter(
                given_up.message, reason=reason, since=since, worker=self._hostname, deaths=deaths
            )
        except Exception:  # a message that cannot be read must not cost the worker's loop
            logger.exception(
                "task %s[%s] has no dead letter: %s",
                *(given_up.name, given_up.task_id, "its message cannot be read"),
            )
            return
        if len(self._waiting) >= _MAX_WAITING:
            _log_lost(letter, f"{_MAX_WAITING} others wait for the broker, which is away")
            return
        self._waiting.append(letter)
        self.start()
        self.wake()

    def close(self, timeout: float = 2.0) -> bool:
        """End the thread; log each dead letter that could not be written."""
        has_ended = super().close(timeout)
        for letter in tuple(self._waiting):
            _log_lost(letter, "the worker ends and the broker is away")
        return has_ended

    def run_round(self) -> None:
        """Write the queued dead letters; retry each until ``store_timeout`` has passed."""
        self.period = math.inf
        while self._waiting:
            letter = self._waiting[0]
            if self._give_up_at is None:
                self._give_up_at = time.monotonic() + self._settings.store_timeout
            try:
                # A new connection each time, because dead letters are rare.
                with connect(self._app) as connection:
                    is_added = queue_of(self._app, connection, self._settings).add(letter)
            except Exception as exc:
                if time.monotonic() < self._give_up_at and not self.is_closed:
                    logger.warning(
                        "task %s[%s] has no dead letter yet: %r; tried again", *_task(letter), exc
                    )
                    self.period = _PAUSE
                    return
                _log_lost(letter, repr(exc))
            else:
                self._log_outcome(letter, is_added=is_added)
            self._waiting.popleft()
            self._give_up_at = None

    leave = run_round

    def _log_outcome(self, letter: dict[str, Any], *, is_added: bool) -> None:
        queue, (task, task_id) = self._settings.dead_letter_queue, _task(letter)
        if is_added:
            logger.warning(
                "task %s[%s] is a dead letter in the queue %s: see `celery gw dead`, and send it "
                "again with `celery gw dead --requeue %s`",
                *(task, task_id, queue, task_id),
            )
        else:
            _log_lost(
                letter,
                f"the queue {queue} is full with {self._settings.max_dead_letters} (setting "
                f"gw_max_dead_letters); send some again with `celery gw dead --requeue ID`, or "
                f"delete all with `celery amqp queue.purge {queue}`",
            )


def _task(letter: dict[str, Any]) -> tuple[str, str]:
    return str(letter["headers"].get("task")), str(letter["headers"].get("id"))


def _log_lost(letter: dict[str, Any], why: str) -> None:
    logger.error("task %s[%s] has no dead letter: %s", *_task(letter), why)
