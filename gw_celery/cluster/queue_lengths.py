"""Queue lengths in the broker, read by the worker's parent."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gw_celery import background_thread
from gw_celery.policy import backoff

logger = logging.getLogger(__name__)

#: Delays in seconds before asking an unreachable broker again: the first, and the maximum.
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 16.0
#: AMQP's reply code for a queue that is not declared.
_NOT_FOUND = 404


@dataclasses.dataclass(frozen=True)
class Length:
    messages: int
    #: Number of consumers; ``None`` if the broker does not report it.
    consumers: int | None = None


def total(lengths: Mapping[str, Length], queues: Iterable[str]) -> Length:
    """Return the total length of several queues; consumers read all of them."""
    listed = [lengths[queue] for queue in queues if queue in lengths]
    consumers = [length.consumers for length in listed if length.consumers is not None]
    return Length(sum(length.messages for length in listed), max(consumers, default=None))


class DeclaredLengths:
    """Lengths of RabbitMQ queues of any type, read by passive declarations, which change nothing.

    They count ready messages, not those that consumers hold. After a failure, it reconnects after
    increasing delays.

    Args:
        app: the Celery app.
        timeout: seconds that each answer of the broker may take.
    """

    def __init__(self, app: Any, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._connection: Any = None
        self._channel: Any = None
        self._waits = backoff.Backoff(_FIRST_WAIT, _LONGEST_WAIT)
        self._next = 0.0
        self._outage = background_thread.Outage(
            logger, "the queue lengths cannot be read, so the pool keeps its size"
        )

    def read(self, queues: Sequence[str]) -> dict[str, Length] | None:
        """Return the lengths by queue; ``None`` while the broker does not answer."""
        if time.monotonic() < self._next:
            return None
        try:
            if self._connection is None:
                self._connection = connection = self._app.connection_for_read()
                connection.connect_timeout = min(connection.connect_timeout or 4.0, self._timeout)
                connection.transport_options.setdefault("read_timeout", self._timeout)
                # Two attempts without a pause; the default channel alone would retry for ever.
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            lengths = {queue: self._read(queue) for queue in queues}
        except Exception as exc:
            self._outage.begin(exc)
            self.close()
            self._next = time.monotonic() + self._waits.next()
            return None
        self._outage.end()
        self._waits.reset()
        return lengths

    def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.release()

    def _read(self, name: str) -> Length:
        if self._channel is None:
            self._channel = self._connection.channel()
        try:
            declared = self._channel.queue_declare(queue=name, passive=True)
        except self._connection.channel_errors as exc:
            # The broker has closed the channel, so that the next queue needs a new one.
            channel, self._channel = self._channel, None
            with contextlib.suppress(*self._connection.channel_errors, OSError):
                channel.close()
            if getattr(exc, "reply_code", None) != _NOT_FOUND:
                raise
            return Length(0, 0)
        return Length(int(declared.message_count), int(declared.consumer_count))
