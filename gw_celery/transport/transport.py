"""kombu's Redis transport with cheaper, safer taking and acknowledging: same keys, same messages.

While there is a backlog, messages are taken many at a time by ``redis_pop``. What one turn of the
worker's loop acknowledges shares one round trip. kombu makes a Redis client for every command that
is not a pop, where one for each channel is enough.

How long a message is unacknowledged is told by the clock of Redis: with kombu, a worker whose own
clock jumps takes for lost what all others are running.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable
from queue import Empty
from typing import Any

import kombu
from kombu.asynchronous import get_event_loop
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps
from redis.exceptions import ResponseError

from gw_celery.transport import pop

logger = logging.getLogger(__name__)

#: kombu publishes no types.
redis: Any = kombu_redis


class QoS(redis.QoS):
    """Acknowledges what one turn of the event loop has finished in one round trip."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acknowledged: list[str] = []
        #: Tags that ``redis_pop`` has recorded as unacknowledged.
        self.recorded: set[str] = set()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record a message that was taken, if it is not."""
        if delivery_tag in self.recorded:
            self.recorded.discard(delivery_tag)
            virtual.QoS.append(self, message, delivery_tag)
            return
        delivery = message.delivery_info
        record = dumps([message._raw, delivery["exchange"], delivery["routing_key"]])
        with self.channel.conn_or_acquire() as client:
            now = _now(client)
            pipe = client.pipeline(transaction=False)
            pipe.hset(self.unacked_key, delivery_tag, record)
            pipe.zadd(self.unacked_index_key, {delivery_tag: now})
            pipe.execute()
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Free the prefetch slot at once; Redis learns of it in the loop's next turn."""
        virtual.QoS.ack(self, delivery_tag)
        if self.channel.closed:
            if delivery_tag in _left_behind:  # the next connection tells Redis
                _left_behind.discard(delivery_tag)
                _done_behind.add(delivery_tag)
            return
        self._acknowledged.append(delivery_tag)
        hub = get_event_loop()
        if hub is None:
            self.flush_acknowledged()
        elif len(self._acknowledged) == 1:
            hub.call_soon(self.flush_acknowledged)

    def flush_acknowledged(self) -> None:
        """Tell Redis; when it cannot be told now, the next connection tells it."""
        tags, self._acknowledged = self._acknowledged, []
        try:
            if not self.channel.closed:
                self.forget(tags)
        except Exception:
            _done_behind.update(tags)
            raise

    #: Read by ``worker.draining``: a stopping worker still runs it.
    flush_acknowledged.is_acknowledgement = True  # type: ignore[attr-defined]

    def forget(self, tags: Collection[str]) -> None:
        """Have Redis forget messages that are done."""
        if not tags:
            return
        with self.channel.conn_or_acquire() as client:
            pipe = client.pipeline(transaction=False)
            pipe.zrem(self.unacked_index_key, *tags)
            pipe.hdel(self.unacked_key, *tags)
            pipe.execute()

    def leave_behind(self, tags: Iterable[str]) -> None:
        """Have the next connection give these messages back."""
        _left_behind.update(tags)

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Give back what is unacknowledged for too long; one worker at a time, as in kombu."""
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        with (
            self.channel.conn_or_acquire() as client,
            contextlib.suppress(redis.MutexHeld),
            redis.Mutex(client, self.unacked_mutex_key, self.unacked_mutex_expire),
        ):
            last = _now(client) - self.visibility_timeout
            page = (start, num) if num else ()
            found = client.zrevrangebyscore(self.unacked_index_key, last, 0, *page)
            for tag in found or []:
                self.restore_by_tag(tag, client)

    def restore_unacked(self, client: Any = None) -> None:
        """Give everything back; what cannot be, for Redis is away, the next connection gives."""
        tags = list(self._delivered)
        try:
            with self.channel.conn_or_acquire(client) as client:
                while tags:
                    self.restore_by_tag(tags[-1], client=client)
                    tags.pop()
        finally:
            _left_behind.update(tags)
        self._delivered.clear()


def _now(client: Any) -> float:
    """The time of day of Redis; this machine's where Redis does not let us ask."""
    try:
        seconds, microseconds = client.time()
    except ResponseError:
        return time.time()
    return float(seconds) + float(microseconds) / 1e6


#: Tags of messages that a closing connection could not give back. Redis would keep them from
#: all workers until the visibility timeout.
_left_behind: set[str] = set()
#: Those of them whose inputs have ended since.
_done_behind: set[str] = set()


class Channel(pop.PoppingChannel):
    """Keeps the client of its connection pool, and what the last connection left undone."""

    QoS = QoS
    _own_client: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        kept = self._own_client
        if kept is None or kept.connection_pool is not self.pool:
            kept = self._own_client = super()._create_client()
        return kept

    def _brpop_start(self, timeout: Any = None) -> None:
        if _left_behind or _done_behind:
            self._settle_behind()
        super()._brpop_start(timeout)

    def _settle_behind(self) -> None:
        """Do for the last connection's messages what it could not do any more."""
        if not isinstance(self.qos, QoS):
            return
        self.qos.forget(_done_behind)
        _done_behind.clear()
        for tag in list(_left_behind):
            try:
                self.qos.restore_by_tag(tag)
            except ValueError as exc:  # its record is no message, and no worker could read it
                logger.error("the message %s of a lost connection cannot be read: %r", tag, exc)
                self.qos.forget([tag])
            _left_behind.discard(tag)

    def close(self) -> None:
        """Close, also with the server away: half a close would be tried again without one."""
        if not self.closed:
            if isinstance(self.qos, QoS):
                self._settle(self.qos.flush_acknowledged)
            if self._in_poll:
                self._settle(self._brpop_read)
                self._in_poll = None
            self._close_watch()
        super().close()

    def _settle(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except Empty:
            return
        except Exception as exc:
            logger.warning("Redis is away while its channel closes: %r", exc)


class Transport(redis.Transport):
    """What the consumer of a worker with the GPU pool reads from Redis with."""

    Channel = Channel


class Connection(kombu.Connection):  # type: ignore[name-defined]
    """A connection that shows kombu's name of the transport, as Flower expects, and uses ours."""

    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return Transport if found is redis.Transport else found


def use(connection: Any) -> Any:
    """Return ``connection``, not connected yet, with this transport in place of kombu's."""
    if connection.get_transport_cls() is redis.Transport:
        return Connection(**connection.info())
    return connection
