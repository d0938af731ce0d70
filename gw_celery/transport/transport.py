"""kombu's Redis transport with faster and safer delivery, for the consumer of our pool's worker.

Keys and messages are kombu's. During a backlog, a script takes many messages at once. Otherwise
``Watch`` waits until a message arrives, and leaves it in its list. The acknowledgements of one turn
of the loop share a round trip. A channel keeps one client; kombu's creates one for each command.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from queue import Empty
from typing import Any

import kombu
from kombu.asynchronous import get_event_loop
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis import Connection as RedisConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, ResponseError

logger = logging.getLogger(__name__)

#: Any, because kombu publishes no types.
redis: Any = kombu_redis

#: Takes messages, and records each as unacknowledged in the same step. kombu takes a message before
#: it records it, and a worker that is killed in between loses the message. KEYS: the hash of
#: unacknowledged messages, their index, then the lists. ARGV: maximum messages, maximum bytes,
#: number of lists that take turns, the queue of each list. Answer: queue, tag and message for each
#: message; the tag is "" if none was found. A record has the form from which kombu restores a
#: message: message, exchange, routing key. The script looks for the tag near the end, where kombu
#: writes it: parsing megabytes would delay all clients. Quotes inside strings are escaped, so no
#: text can look like a tag.
SCRIPT = """
local most, largest, width = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = redis.call('TIME')[1]
local taken, count, size = {}, 0, 0
local function tag_of(item)
  local found = string.match(string.sub(item, -4096), '.*"delivery_tag": ?"([^"]+)"')
  if found then return found end
  local is_json, message = pcall(cjson.decode, item)
  local properties = is_json and type(message) == 'table' and message.properties
  local tag = type(properties) == 'table' and properties.delivery_tag
  return type(tag) == 'string' and tag or ''
end
for first = 3, #KEYS, width do
  local found = true
  while found and count < most and size < largest do
    found = false
    for at = first, first + width - 1 do
      local item = count < most and size < largest and redis.call('RPOP', KEYS[at])
      if item then
        found, count, size = true, count + 1, size + #item
        local queue, tag = ARGV[1 + at], tag_of(item)
        if tag ~= '' then
          redis.call('HSET', KEYS[1], tag, '[' .. item .. ', "", ' .. cjson.encode(queue) .. ']')
          redis.call('ZADD', KEYS[2], now, tag)
        end
        table.insert(taken, queue)
        table.insert(taken, tag)
        table.insert(taken, item)
      end
    end
  end
end
return taken
"""
#: Maximum messages and bytes of one answer: more would block Redis and the worker's loop.
MOST = 32
LARGEST = 1024 * 1024
#: Seconds after which an idle worker checks its lists and the connection without a notification.
LOOK_AGAIN = 10.0

#: Tags of messages that a closing connection could not return; the next one returns them. Else
#: no worker would get them before the visibility timeout.
_left_behind: set[str] = set()
#: Tags of messages whose acknowledgement did not reach Redis.
_done_behind: set[str] = set()


class QoS(redis.QoS):
    """The messages that a worker has taken and not acknowledged.

    Redis's clock measures their age. In kombu the worker's clock does: after a jump of its clock, a
    worker would restore messages that other workers still run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acknowledged: list[str] = []
        #: Tags that the script has recorded as unacknowledged.
        self.recorded: set[str] = set()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record a message that was taken, unless the script has recorded it."""
        if delivery_tag in self.recorded:
            self.recorded.discard(delivery_tag)
        else:
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
        """Free a place in the prefetch count now; write to Redis in the loop's next turn."""
        virtual.QoS.ack(self, delivery_tag)
        if self.channel.closed:
            if delivery_tag in _left_behind:  # the next connection writes it
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
        """Write the acknowledgements to Redis; after a failure, the next connection does."""
        tags, self._acknowledged = self._acknowledged, []
        try:
            if not self.channel.closed:
                self.forget(tags)
        except Exception:
            _done_behind.update(tags)
            raise

    #: ``worker.consumer.run_meanwhile`` reads it: a stopping worker still runs this callback.
    flush_acknowledged.is_acknowledgement = True  # type: ignore[attr-defined]

    def forget(self, tags: Collection[str]) -> None:
        """Delete the records of acknowledged messages from Redis."""
        if not tags:
            return
        with self.channel.conn_or_acquire() as client:
            pipe = client.pipeline(transaction=False)
            pipe.zrem(self.unacked_index_key, *tags)
            pipe.hdel(self.unacked_key, *tags)
            pipe.execute()

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Return messages unacknowledged for too long; in one worker at a time, as in kombu."""
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
            for tag in client.zrevrangebyscore(self.unacked_index_key, last, 0, *page) or []:
                self.restore_by_tag(tag, client)

    def restore_unacked(self, client: Any = None) -> None:
        """Return all messages; after a failure, the next connection returns the rest."""
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
    """Return Redis's time of day, or this machine's if Redis refuses the command."""
    try:
        seconds, microseconds = client.time()
    except ResponseError:
        return time.time()
    return float(seconds) + float(microseconds) / 1e6


class Channel(redis.Channel):
    """Takes many messages at once during a backlog; uses kombu's BRPOP on an unsuitable server.

    It keeps its client, and completes what the last connection could not complete.
    """

    QoS = QoS

    #: Whether there may be messages: the last answer had one, or Redis reported a change.
    has_backlog = False
    #: Our command whose answer is pending.
    _asked: str | None = None
    #: Number of messages requested.
    _asked_for = 0
    #: Hash of the script on the server.
    _script: str | None = None
    _may_script = True
    _watch: Watch | None = None
    _may_watch = True
    _own_client: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Tags of consumers that do not acknowledge. Celery's mingle has one, and waits for answers
        #: without the event loop that reads the watch.
        self._careless: set[str] = set()
        super().__init__(*args, **kwargs)

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any
    ) -> Any:
        if no_ack:
            self._careless.add(consumer_tag)
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def basic_cancel(self, consumer_tag: str) -> Any:
        self._careless.discard(consumer_tag)
        return super().basic_cancel(consumer_tag)

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        kept = self._own_client
        if kept is None or kept.connection_pool is not self.pool:
            kept = self._own_client = super()._create_client()
        return kept

    def _update_queue_cycle(self) -> None:
        """Check the lists again after a queue was added or removed."""
        super()._update_queue_cycle()
        if self._watch is not None:
            self._watch.wake()

    # -- asking --

    def _brpop_start(self, timeout: Any = None) -> None:
        """Request many messages during a backlog; otherwise wait for one."""
        # A lost connection may have lost an answer.
        self._asked = None
        if _left_behind or _done_behind:
            self._settle_behind()
        queues = self.active_queues
        if not (queues and self._can_record()):
            super()._brpop_start(timeout)
        elif self.has_backlog:
            self._ask_for_messages(self._queue_cycle.consume(len(queues)))
        elif (watch := self._following()) is None:
            super()._brpop_start(timeout)
        elif watch.is_due(time.monotonic()):
            self._ask("EXISTS", *(key for _, key in self._lists(queues)))

    def _lists(self, queues: list[str]) -> list[tuple[str, str]]:
        """Return each list with its queue, highest priority first."""
        steps = self.priority_steps
        return [(queue, self._q_for_pri(queue, step)) for step in steps for queue in queues]

    def _ask_for_messages(self, queues: list[str]) -> None:
        lists = self._lists(queues)
        # Strategies other than round-robin empty one queue after the other.
        width = len(queues) if self.queue_order_strategy == "round_robin" else 1
        keys = [self.unacked_key, self.unacked_index_key, *(key for _, key in lists)]
        if "can_consume" in vars(self.qos):  # Celery decides (worker_disable_prefetch)
            self._asked_for = 1
        else:
            free: int | None = self.qos.can_consume_max_estimate()
            self._asked_for = MOST if free is None else max(1, min(MOST, free))
        limits = (self._asked_for, LARGEST, width)
        self._ask(
            "EVALSHA", self._script, len(keys), *keys, *limits, *(queue for queue, _ in lists)
        )

    def _ask(self, command: str, *args: Any) -> None:
        self._asked = command
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self.client.connection.send_command(command, *args)

    def _can_record(self) -> bool:
        """Return whether the script can take and record messages on this server."""
        if not isinstance(self.qos, QoS) or self._careless or self.global_keyprefix:
            return False
        if self._script is None and self._may_script:
            try:
                self._script = self._create_client().script_load(SCRIPT)
            except ResponseError as exc:
                self._do_without_script(exc)
        return self._script is not None

    def _do_without_script(self, exc: ResponseError) -> None:
        self._may_script, self._script = False, None
        logger.warning(
            "Redis refuses scripts: %s. Messages come one by one: allow SCRIPT LOAD, EVALSHA", exc
        )

    def _following(self) -> Watch | None:
        """Return the watch for new messages; ``None`` if the server or loop does not allow one."""
        hub = get_event_loop()
        if hub is None or not self._may_watch:
            return None
        try:
            if self._watch is None:
                self._watch = Watch(self, hub)
            self._watch.follow(self.client.connection)
        except ResponseError as exc:
            self._may_watch = False
            self._close_watch()
            logger.warning(
                "Redis refuses CLIENT TRACKING: %s. Allow it: a worker that is killed as it takes "
                "the first message after a pause may lose it",
                exc,
            )
        return self._watch

    def _close_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    # -- answers --

    def _brpop_read(self, **options: Any) -> Any:
        """Deliver the requested messages; raise ``Empty`` if there are none, as kombu does."""
        if self._asked == "EVALSHA":
            return self._deliver_taken(self._read_answer() or [])
        if self._asked == "EXISTS":
            if self._read_answer():
                self.has_backlog = True
            raise Empty
        try:
            answer = super()._brpop_read(**options)
        except Empty:
            self.has_backlog = False
            raise
        except self.connection_errors:
            raise
        except Exception as exc:
            # The message is taken already, and the exception would end the worker. kombu cannot
            # restore it.
            logger.critical("an unreadable message is dropped: %r", exc, exc_info=True)
            answer = True
        self.has_backlog = True
        return answer

    def _read_answer(self) -> Any:
        """Return the pending answer; ``None`` if the server refused."""
        asked, self._asked = self._asked, None
        try:
            return self.client.parse_response(self.client.connection, asked)
        except NoScriptError:
            self._script = None  # the server has restarted
            if self._watch is not None:
                self._watch.wake()  # messages were found, but not taken
            return None
        except ResponseError as exc:
            self._do_without_script(exc)
            return None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            getattr(self, "_flush_brpop_reauth", lambda: None)()  # kombu 5.7

    def _deliver_taken(self, taken: list[bytes]) -> bool:
        # If fewer messages than requested come, the lists were empty after them.
        is_cut = sum(map(len, taken[2::3])) >= LARGEST
        self.has_backlog = is_cut or len(taken) >= 3 * self._asked_for
        if not taken:
            raise Empty
        messages = list(self._messages(taken))
        try:
            while messages and messages[0][0] in self.connection._callbacks:
                queue, message = messages.pop(0)
                self._queue_cycle.rotate(queue)
                self.connection._deliver(message, queue)
                if (tag := message["properties"]["delivery_tag"]) in self.qos.recorded:
                    self.qos.recorded.discard(tag)
                    self.qos.forget([tag])  # a consumer that came meanwhile does not acknowledge
        finally:
            # Some are left if a callback raised, or if a queue was closed meanwhile.
            self._give_back([message for _, message in messages])
        return True

    def _messages(self, taken: list[bytes]) -> Iterator[tuple[str, Any]]:
        """Yield the queue and content of each message; log and drop what is not a message."""
        for name, found, text in zip(taken[::3], taken[1::3], taken[2::3], strict=True):
            queue, tag = bytes_to_str(name), bytes_to_str(found)
            try:
                message = loads(bytes_to_str(text))
                own = redis.Channel.Message(message, channel=self).delivery_tag
                if not isinstance(own, str):
                    raise TypeError(f"its delivery_tag is {own!r}")
            except Exception as exc:
                logger.critical(
                    "an unreadable message in %s is dropped: %r: %.200r", queue, exc, text[:200]
                )
                self.qos.forget([tag] if tag else [])
                continue
            if tag == own:
                self.qos.recorded.add(tag)
            elif tag:
                self.qos.forget([tag])
            yield queue, message

    def _give_back(self, messages: list[Any]) -> None:
        """Return undelivered messages, newest first, so that the oldest is taken next."""
        while messages:
            tag = messages[-1]["properties"]["delivery_tag"]
            try:
                if tag in self.qos.recorded:
                    self.qos.restore_by_tag(tag)
                else:
                    self.connection._reject_inbound_message(messages[-1])
            except self.connection_errors:
                _left_behind.update(message["properties"]["delivery_tag"] for message in messages)
                raise
            self.qos.recorded.discard(tag)
            messages.pop()

    # -- ends of connections --

    def _settle_behind(self) -> None:
        """Complete the acknowledgements and returns of the last connection."""
        if not isinstance(self.qos, QoS):
            return
        self.qos.forget(_done_behind)
        _done_behind.clear()
        for tag in list(_left_behind):
            try:
                self.qos.restore_by_tag(tag)
            except ValueError as exc:  # no worker can read the record
                logger.error("the unreadable message %s is dropped: %r", tag, exc)
                self.qos.forget([tag])
            _left_behind.discard(tag)

    def close(self) -> None:
        """Close, even if the server is away: a partial close would be retried for ever."""
        if not self.closed:
            if isinstance(self.qos, QoS):
                _settle(self.qos.flush_acknowledged)
            if self._in_poll:
                _settle(self._brpop_read)
                self._in_poll = None
            self._close_watch()
        super().close()


def _settle(what: Callable[[], Any]) -> None:
    try:
        what()
    except Empty:
        return
    except Exception as exc:
        logger.warning(
            "Redis was away when a connection closed: %r; ended inputs may be delivered again", exc
        )


class Watch:
    """A connection on which Redis reports changes to the lists that another connection has read.

    An idle worker reads that its lists are empty; from then on, Redis reports the first message.
    kombu waits with BRPOP instead, which takes a message before it can be recorded. For up to a
    second, BRPOP also ignores changes of the queues.

    Source: Redis 6 client-side caching with two connections,
    https://redis.io/docs/latest/develop/reference/client-side-caching/

    Args:
        channel: reads the lists; gets ``has_backlog`` when there may be messages.
        hub: the event loop of the worker.
    """

    def __init__(self, channel: Channel, hub: Any) -> None:
        self._channel = channel
        self._hub = hub
        options = {**channel._connparams(), "protocol": 2, "decode_responses": False}
        # The name shows the purpose of the connection in `CLIENT LIST`.
        for name, default in (("socket_timeout", 5.0), ("client_name", "gw_celery-watch")):
            if options.get(name) is None:
                options[name] = default
        # redis-py's own PING fails on a subscriber, whose answer differs. The error would end the
        # worker after a pause with all slots in use. `_probe` checks this connection instead.
        options["health_check_interval"] = 0
        options.pop("max_connections", None)
        self._link = options.pop("connection_class", RedisConnection)(**options)
        self._link.connect()
        self._id = self._ask("CLIENT", "ID")
        # In the older protocol, only a subscriber gets reports unasked; the lists must be read on
        # another connection.
        self._ask("SUBSCRIBE", "__redis__:invalidate")
        self._reader_socket: Any = None
        #: Time to read the lists again without a report; ``None``: now.
        self._look_at: float | None = None
        self._owes_answer = False
        hub.add_reader(self._link._sock, self._read)

    def follow(self, reader: Any) -> None:
        """Make Redis report changes to what ``reader`` reads from now on.

        Raises:
            ResponseError: if the server or its access rules refuse.
        """
        if self._reader_socket is not reader._sock or reader._sock is None:
            reader.send_command("CLIENT", "TRACKING", "ON", "REDIRECT", self._id)
            reader.read_response()
            self._reader_socket = reader._sock
            self.wake()

    def is_due(self, now: float) -> bool:
        """Return whether to read the lists now; if so, not again until a change or a timeout."""
        if self._look_at is not None:
            if now < self._look_at:
                return False
            self._probe()
        self._look_at = now + LOOK_AGAIN
        return True

    def wake(self) -> None:
        """Schedule another reading of the lists."""
        self._look_at = None

    def close(self) -> None:
        if self._link._sock is not None:
            self._hub.remove_reader(self._link._sock)
        self._link.disconnect()

    def _probe(self) -> None:
        """Detect a dead connection, which would delay the first message after each pause."""
        if self._owes_answer:
            self.close()
            raise RedisConnectionError(
                f"Redis did not answer for {LOOK_AGAIN:.0f} s on the connection that tells of "
                f"new messages"
            )
        self._owes_answer = True
        self._link.send_command("PING")

    def _read(self) -> None:
        try:
            while self._link.can_read(timeout=0):
                answer = self._link.read_response()
                self._owes_answer = False
                if answer[0] == b"message":
                    self.wake()
                    self._channel.has_backlog = True
        except (OSError, RedisConnectionError):
            self.close()
            raise
        except InvalidResponse as exc:
            # Redis 7.0 reports FLUSHDB, of any database, in the wrong protocol. Celery reconnects
            # after a ConnectionError; any other exception would end the worker.
            self.close()
            raise RedisConnectionError(
                f"Redis cannot be read on the connection that tells of new messages: {exc}"
            ) from exc

    def _ask(self, *command: Any) -> Any:
        self._link.send_command(*command)
        return self._link.read_response()


class Transport(redis.Transport):
    """The transport of the consumer in a worker with the GPU pool."""

    Channel = Channel


class Connection(kombu.Connection):  # type: ignore[name-defined]
    """A connection with our transport; it keeps kombu's transport name for Flower."""

    def get_transport_cls(self) -> Any:
        transport = super().get_transport_cls()
        return Transport if transport is redis.Transport else transport


def use(connection: Any) -> Any:
    """Return an unconnected copy of a Redis connection, with our transport; others unchanged."""
    if connection.get_transport_cls() is redis.Transport:
        return Connection(**connection.info())
    return connection
