"""kombu's Redis transport with faster and safer delivery, for the consumer of our pool's worker.

Queues and messages are kombu's. A script takes many messages at once, and holds them for this
worker (see ``holds``). ``Watch`` reports new messages without taking them. The acknowledgements of
one turn of the loop share a round trip with the next command. A channel keeps one client; kombu's
creates one for each command.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import Empty
from types import MappingProxyType
from typing import Any, NamedTuple

import kombu
from kombu.asynchronous import get_event_loop
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoPermissionError, NoScriptError, ResponseError

from gw_celery import errors
from gw_celery.transport import find, holds, refusals

logger = logging.getLogger(__name__)

#: Any, because kombu publishes no types.
redis: Any = kombu_redis

#: Maximum messages and bytes of one answer: more would block Redis and the worker's loop.
MOST = 32
LARGEST = 1024 * 1024
#: Seconds after which an idle worker checks its lists and the connection without a notification.
LOOK_AGAIN = 10.0

#: Seconds after which a Redis that refused a command is asked again.
PAUSE = 1.0


class QoS(redis.QoS):
    """The messages that a worker has taken and not acknowledged.

    The delivery tag of each is the name of its hold. Holds outlive the connection: a new channel
    begins with those whose inputs the pool has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._delivered.update(dict.fromkeys(self.channel.holds.in_use()))

    def append(self, message: Any, delivery_tag: str) -> None:
        """Count a message; the channel has its hold. Redis keeps nothing of a fanout exchange."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Free a place in the prefetch count now; the channel writes to Redis soon."""
        channel = self._free(delivery_tag)
        if holds.parts(delivery_tag) is None:
            return
        self.channel.holds.acknowledged.append(delivery_tag)
        if channel is not None:
            channel.schedule_flush()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a message, or put it behind all others of its queue."""
        if not requeue or holds.parts(delivery_tag) is None:
            self.ack(delivery_tag)
        elif (channel := self._free(delivery_tag)) is not None:
            channel.give_back([delivery_tag], "LPUSH")
        # Without a connection, the next one finds a hold that the pool does not know.

    def _free(self, delivery_tag: str) -> Channel | None:
        """Free a place in the prefetch count; return the channel that writes about the message.

        After a lost connection, this is another one than the channel that brought the message.
        """
        virtual.QoS.ack(self, delivery_tag)
        channel: Channel | None = self.channel.holds.channel
        if channel is None:
            return None if self.channel.closed else self.channel
        if channel is not self.channel and delivery_tag in channel.qos._delivered:
            virtual.QoS.ack(channel.qos, delivery_tag)
        return channel

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Return nothing: the holds outlive the channel, and ``cluster`` returns the last ones."""
        self._on_collect.cancel()

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Return what workers with other pools have left unacknowledged for too long.

        One worker does it at a time, as in kombu. Redis's clock measures the age: after a jump of
        its own clock, a worker would return messages that others still run.
        """
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        with (
            self.channel.conn_or_acquire() as client,
            contextlib.suppress(redis.MutexHeld, ResponseError),
            redis.Mutex(client, self.unacked_mutex_key, self.unacked_mutex_expire),
        ):
            seconds, microseconds = client.time()
            last = seconds + microseconds / 1e6 - self.visibility_timeout
            page = (start, num) if num else ()
            index = f"{self.channel.global_keyprefix}{self.unacked_index_key}"
            found = self.channel.plain_client.zrevrangebyscore(index, last, 0, *page)
            for tag in found or []:
                self.restore_by_tag(tag, client)


class _Taking(NamedTuple):
    """A command that takes messages, whose answer is pending."""

    incarnation: str
    #: Number of the first hold.
    first: int
    #: Maximum number of messages.
    most: int
    #: The queue of each list.
    queues: list[str]


class Channel(redis.Channel):
    """Takes many messages at once during a backlog; waits without taking any otherwise.

    A server that refuses commands for now is asked again every second.
    """

    QoS = QoS

    #: Whether there may be messages: the last answer had one, or Redis reported a change.
    has_backlog = False
    #: The command whose answer is pending, after the answers to some acknowledgements.
    _asked: str | None = None
    _taking: _Taking | None = None
    #: Acknowledged holds that were sent with the pending command, by incarnation.
    _sent: Mapping[str, list[str]] = MappingProxyType({})
    #: Hash of the script on the server.
    _script: str | None = None
    _watch: Watch | None = None
    _may_watch = True
    _own_client: Any = None
    _plain_client: Any = None
    _is_flush_due = False
    #: Time before which nothing is asked, because Redis refused a command.
    _paused_until = 0.0
    #: Time of the next search for holds that this process does not know.
    _check_at = 0.0

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        self.holds: holds.Holds = connection.client.holds
        #: Queues and binding keys of another type, which were reported.
        self._broken: set[str] = set()
        #: Arguments of bindings that Redis refused.
        self._unbound: list[tuple[Any, ...]] = []
        #: Tag -> queue, of consumers that do not acknowledge. Celery's mingle has one, and waits
        #: for answers without the event loop that reads the watch.
        self._careless: dict[str, str] = {}
        try:
            super().__init__(connection, **kwargs)
            self._refuse_cluster()
            # The consumer's start writes: a server that refuses that for now is unreachable.
            self.plain_client.set(f"{self.global_keyprefix}gw:check", "", px=1000)
        except ResponseError as exc:
            if not refusals.is_refusal(exc):
                raise
            raise RedisConnectionError(f"Redis refuses commands for now: {exc!r}") from exc

    def _refuse_cluster(self) -> None:
        if self.plain_client.info("cluster").get("cluster_enabled"):
            raise errors.ConfigurationError(
                "the broker is a node of a Redis Cluster: kombu and the scripts of this transport "
                "need all keys on one server. Use a Redis without cluster mode, or Sentinel"
            )

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any
    ) -> Any:
        if no_ack or not self.ack_emulation:
            self._careless[consumer_tag] = queue
        else:
            self.holds.channel = self
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def basic_cancel(self, consumer_tag: str) -> Any:
        self._careless.pop(consumer_tag, None)
        return super().basic_cancel(consumer_tag)

    def _queue_bind(self, *args: Any) -> None:
        """Bind a queue, later if Redis refuses it now."""
        try:
            super()._queue_bind(*args)
        except ResponseError as exc:
            if refusals.is_wrong_type(exc):
                self._report_broken_binding(args[0], exc)
                return
            if not refusals.is_refusal(exc):
                raise
            self._unbound.append(args)
            self.pause(exc)

    def _report_broken_binding(self, exchange: str, exc: ResponseError) -> None:
        key = f"{self.global_keyprefix}{self.keyprefix_queue % (exchange,)}"
        if key not in self._broken:
            self._broken.add(key)
            logger.error(
                "the key %s in Redis is not a set (%s): its queues are served, but messages of the "
                "exchange %s may not reach them. Delete this key, and restart the workers",
                *(key, exc, exchange),
            )

    def _size(self, queue: str) -> int:
        """Return the length of a queue; 0 if Redis refuses to answer now."""
        try:
            return int(super()._size(queue))
        except ResponseError as exc:
            if not (refusals.is_refusal(exc) or refusals.is_wrong_type(exc)):
                raise
            return 0

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        kept = self._own_client
        if kept is None or kept.connection_pool is not self.pool:
            kept = self._own_client = super()._create_client()
        return kept

    @property
    def plain_client(self) -> Any:
        """A client for whole commands; unlike kombu's, it adds no prefix to keys."""
        if self._plain_client is None or self._plain_client.connection_pool is not self.pool:
            self._plain_client = Redis(connection_pool=self.pool)
        return self._plain_client

    def _update_queue_cycle(self) -> None:
        """Check the lists again after a queue was added or removed."""
        super()._update_queue_cycle()
        if self._watch is not None:
            self._watch.wake()

    # -- asking --

    def _brpop_start(self, timeout: Any = None) -> None:
        """Request many messages during a backlog; otherwise wait for one."""
        self._restore_sent()  # a lost connection may have lost an answer
        at = time.monotonic()
        if at < self._paused_until:
            return
        if self.holds.channel is not self or self._careless or not self.active_queues:
            super()._brpop_start(timeout)
            return
        if not self.holds.is_fresh:
            return
        try:
            self._ask_next(at, timeout)
        except ResponseError as exc:
            self.pause(exc)

    def _ask_next(self, at: float, timeout: Any) -> None:
        while self._unbound:
            super()._queue_bind(*self._unbound[-1])
            self._unbound.pop()
        if at >= self._check_at:
            # Set before: a message that cannot go back must not stop the others.
            self._check_at = at + self.holds.ttl
            self._give_back_unknown()
        queues = self.active_queues
        if self.has_backlog:
            self._ask_for_messages(self._queue_cycle.consume(len(queues)))
        elif self.holds.acknowledged:
            self._ask(None)
        elif (watch := self._following()) is None:
            super()._brpop_start(timeout)
        elif watch.is_due(at):
            self._ask("EXISTS", *(key for _, key in self._lists(queues)))

    def _lists(self, queues: list[str]) -> list[tuple[str, str]]:
        """Return each list with its queue, highest priority first."""
        prefix, steps = self.global_keyprefix, self.priority_steps
        listed = ((queue, self._q_for_pri(queue, step)) for step in steps for queue in queues)
        return [(queue, f"{prefix}{key}") for queue, key in listed]

    def _ask_for_messages(self, queues: list[str]) -> None:
        if self._script is None:
            self._script = self.plain_client.script_load(holds.TAKE)
        lists = self._lists(queues)
        # Strategies other than round-robin empty one queue after the other.
        width = len(queues) if self.queue_order_strategy == "round_robin" else 1
        most = 1
        if "can_consume" not in vars(self.qos):  # otherwise Celery decides: worker_disable_prefetch
            free: int | None = self.qos.can_consume_max_estimate()
            most = MOST if free is None else max(1, min(MOST, free))
        incarnation, first = self.holds.incarnation, self.holds.allot(most)
        keys = [self._held_in(incarnation), holds.tombstone(self.global_keyprefix, incarnation)]
        keys += [key for _, key in lists]
        self._taking = _Taking(incarnation, first, most, [queue for queue, _ in lists])
        self._ask("EVALSHA", self._script, len(keys), *keys, first, most, LARGEST, width)

    def _ask(self, command: str | None, *args: Any) -> None:
        """Send the waiting acknowledgements and one command (``None``: no other one)."""
        self._sent = holds.grouped(self.holds.acknowledged)
        self.holds.acknowledged.clear()
        commands = [
            self._forgetting(incarnation, named) for incarnation, named in self._sent.items()
        ]
        if command is not None:
            commands.append((command, *args))
        self._asked = command or "HDEL"
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        connection.send_packed_command(connection.pack_commands(commands))

    def _held_in(self, incarnation: str) -> str:
        return holds.key(self.global_keyprefix, incarnation)

    def _forgetting(self, incarnation: str, numbers: list[str]) -> tuple[str, ...]:
        return ("HDEL", self._held_in(incarnation), *numbers)

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
            self._close_watch()
            if refusals.is_refusal(exc) and not isinstance(exc, NoPermissionError):
                raise
            self._may_watch = False
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

    def pause(self, exc: ResponseError) -> None:
        """Ask nothing for a second, because Redis refused a command."""
        self._paused_until = time.monotonic() + PAUSE
        self.has_backlog = True
        if refusals.is_refusal(exc) or refusals.is_wrong_type(exc):
            self._check_at = 0.0  # some messages may not have been given back
        self.holds.refuse(exc)

    # -- answers --

    def _brpop_read(self, **options: Any) -> Any:
        """Deliver the requested messages; raise ``Empty`` if there are none, as kombu does."""
        if self._asked is None:
            return self._read_brpop(**options)
        asked, answer = self._asked, self._read_answer()
        if self.holds.acknowledged:
            self.schedule_flush()
        if asked == "EVALSHA" and answer is not None:
            assert self._taking is not None
            return self._deliver_taken(self._taking, answer)
        if asked == "EXISTS" and answer:
            self.has_backlog = True
        raise Empty

    def _read_brpop(self, **options: Any) -> Any:
        """Deliver the message of kombu's own command, held first if its consumer acknowledges."""
        client = self.client
        try:
            answer = client.parse_response(client.connection, "BRPOP", **options)
        except self.connection_errors:
            client.connection.disconnect()
            raise
        except ResponseError as exc:
            if refusals.is_refusal(exc):
                self.pause(exc)
            self._report_broken_lists(self.active_queues)
            self.has_backlog = True  # the script serves the other queues
            self._paused_until = time.monotonic() + PAUSE
            raise Empty from exc
        finally:
            self._end_poll()
        self.holds.serve()
        if not answer:
            self.has_backlog = False
            raise Empty
        key, item = answer
        queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
        taking = _Taking(self.holds.incarnation, self.holds.allot(1), 1, [queue])
        if queue not in self._careless.values():
            self._hold(taking, f"{self.global_keyprefix}{bytes_to_str(key)}\n".encode() + item)
        return self._deliver_taken(taking, [1, item])

    def _hold(self, taking: _Taking, record: bytes) -> None:
        """Hold a message; if Redis refuses that, it is delivered, and lost with this process."""
        try:
            self.plain_client.hset(self._held_in(taking.incarnation), str(taking.first), record)
        except ResponseError as exc:
            self.pause(exc)

    def _end_poll(self) -> None:
        self._in_poll = None
        getattr(self, "_flush_brpop_reauth", lambda: None)()  # kombu 5.7

    def _read_answer(self) -> Any:
        """Return the answer to the pending command; ``None`` if the server refused."""
        connection = self.client.connection
        count = len(self._sent) + (self._asked != "HDEL")
        try:
            answers = [_read(connection) for _ in range(count)]
        except self.connection_errors:
            self._restore_sent()
            connection.disconnect()
            raise
        finally:
            self._end_poll()
        refused = next((one for one in answers if isinstance(one, ResponseError)), None)
        if refused is None:
            self._asked, self._sent = None, {}
            self.holds.serve()
            return answers[-1]
        self._restore_sent()
        self._follow_refusal(refused)
        # Acknowledgements alone may be refused: then messages have been taken.
        return None if isinstance(answers[-1], ResponseError) else answers[-1]

    def _follow_refusal(self, exc: ResponseError) -> None:
        if isinstance(exc, NoScriptError):
            self._script = None  # the server has restarted
            if self._watch is not None:
                self._watch.wake()  # messages were found, but not taken
            return
        if not str(exc).startswith("GWDEAD"):  # the thread of the heartbeats learns of it
            self.pause(exc)
        self._paused_until = time.monotonic() + PAUSE

    def _restore_sent(self) -> None:
        """Keep acknowledgements that may not have reached Redis; they can be repeated."""
        if self._asked == "EVALSHA":
            self._check_at = 0.0  # messages may have been taken
        sent, self._sent, self._asked = self._sent, {}, None
        for incarnation, numbers in sent.items():
            self.holds.acknowledged += [holds.name(incarnation, int(one)) for one in numbers]

    def _deliver_taken(self, taking: _Taking, answer: list[Any]) -> bool:
        taken = list(zip(answer[::2], answer[1::2], strict=True))
        if broken := {taking.queues[-index - 1] for index, _ in taken if index < 0}:
            self._report_broken_lists(sorted(broken))
        taken = [(index, item) for index, item in taken if index > 0]
        # If fewer messages than requested come, the lists were empty after them.
        is_cut = sum(len(item) for _, item in taken) >= LARGEST
        self.has_backlog = is_cut or len(taken) >= taking.most
        if not taken:
            raise Empty
        messages = list(self._messages(taking, taken))
        try:
            while messages and messages[0][0] in self.connection._callbacks:
                queue, message = messages.pop(0)
                self._queue_cycle.rotate(queue)
                self.connection._deliver(message, queue)
                tag = message["properties"]["delivery_tag"]
                if tag not in self.qos._delivered:
                    # A consumer that came meanwhile does not acknowledge.
                    self.holds.acknowledged.append(tag)
        finally:
            # Some are left if a callback raised, or if a queue was closed meanwhile.
            self.give_back([left["properties"]["delivery_tag"] for _, left in messages])
        return True

    def _report_broken_lists(self, queues: list[str]) -> None:
        """Log each key of ``queues`` once that is not a list; the other queues are served."""
        for queue, key in self._lists(queues):
            if key in self._broken:
                continue
            try:
                kind = bytes_to_str(self.plain_client.type(key))
            except ResponseError as exc:
                logger.debug("the type of %s is unknown: %r", key, exc)
                continue
            if kind not in ("list", "none"):
                self._broken.add(key)
                logger.error(
                    "the queue %s cannot be read: the key %s in Redis is a %s, not a list. Delete "
                    "or rename this key",
                    *(queue, key, kind),
                )

    def _messages(
        self, taking: _Taking, taken: list[tuple[int, bytes]]
    ) -> Iterator[tuple[str, Any]]:
        """Yield the queue and content of each message; log and drop what is not a message."""
        for number, (index, text) in enumerate(taken, taking.first):
            queue, tag = taking.queues[index - 1], holds.name(taking.incarnation, number)
            try:
                message = loads(bytes_to_str(text))
                message["properties"]["delivery_tag"] = tag
                redis.Channel.Message(message, channel=self)
            except Exception as exc:
                logger.critical(
                    "an unreadable message in %s is dropped: %r: %.200r", queue, exc, text[:200]
                )
                self.holds.acknowledged.append(tag)
                continue
            yield queue, message

    # -- what is held --

    def give_back(self, tags: list[str], command: str = "RPUSH") -> None:
        """Return messages to their queues; after an error, the next search finds them."""
        try:
            for incarnation, numbers in holds.grouped(tags).items():
                self._give_back(self._held_in(incarnation), map(int, numbers), command)
        except ResponseError as exc:
            self.pause(exc)

    def _give_back(self, held_in: str, numbers: Iterable[int], command: str = "RPUSH") -> int:
        """Return messages to their queues, and the number of them; log a key that is not a list.

        Raises:
            ResponseError: if Redis refuses that for now.
        """
        try:
            return holds.give_back(self.plain_client, held_in, numbers, command=command)
        except ResponseError as exc:
            if not refusals.is_wrong_type(exc):
                raise
            if str(exc) not in self._broken:
                self._broken.add(str(exc))
                logger.error("messages cannot be given back: %s", exc)
            return 0

    def _give_back_unknown(self) -> None:
        """Return the messages of holds that this process does not know.

        Redis has taken them, but its answer was lost; or Celery forgot them with a connection; or
        a failover of Redis has undone their acknowledgement.
        """
        own = self.holds.incarnation
        held_in = self._held_in(own)
        unknown = set(holds.numbers_of(self.plain_client, held_in))
        for incarnation in holds.grouped(self.holds.acknowledged).keys() - {own}:
            find.fields(self.plain_client, self._held_in(incarnation))
        delivered = self.qos._delivered.keys() - self.qos._dirty  # without what was given back
        known = {*delivered, *self.holds.in_use(), *self.holds.acknowledged}
        listed = itertools.chain.from_iterable(holds.grouped(known).values())
        if unknown := unknown.difference(map(int, listed)):
            given = self._give_back(held_in, unknown)
            logger.info("%d messages that this worker did not start are given back", given)

    def schedule_flush(self) -> None:
        hub = get_event_loop()
        if hub is None:
            self.flush_acknowledged()
        elif not self._is_flush_due:
            self._is_flush_due = True
            hub.call_soon(self.flush_acknowledged)

    def flush_acknowledged(self) -> None:
        """Write the acknowledgements to Redis, unless the answer to a command is awaited.

        That answer sends them on. A stopping worker consumes no queue, and awaits no answer.
        """
        self._is_flush_due = False
        if self.closed or (self._asked is not None and self.active_queues):
            return
        groups = holds.grouped(self.holds.acknowledged)
        self.holds.acknowledged.clear()
        try:
            with self.plain_client.pipeline(transaction=False) as pipe:
                for incarnation, numbers in groups.items():
                    pipe.hdel(self._held_in(incarnation), *numbers)
                pipe.execute()
        except BaseException as exc:
            for incarnation, numbers in groups.items():
                self.holds.acknowledged += [holds.name(incarnation, int(one)) for one in numbers]
            if not isinstance(exc, ResponseError):
                raise
            self.pause(exc)

    #: ``worker.consumer.run_meanwhile`` reads it: a stopping worker still runs this callback.
    flush_acknowledged.is_acknowledgement = True  # type: ignore[attr-defined]

    # -- ends of connections --

    def close(self) -> None:
        """Close, even if the server is away: a partial close would be retried for ever."""
        if not self.closed:
            if self._in_poll:
                _settle(self._brpop_read)
                self._in_poll = None
            self._restore_sent()
            if self.holds.channel is self:
                _settle(self.flush_acknowledged)
                self.holds.channel = None
            self._close_watch()
        super().close()


def _read(connection: Any) -> Any:
    """Return the next answer, also if it is an error: the answers after it must be read."""
    try:
        return connection.read_response()
    except ResponseError as exc:
        return exc


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
        pool = channel.pool
        options = {**pool.connection_kwargs, "protocol": 2, "decode_responses": False}
        # The name shows the purpose of the connection in `CLIENT LIST`.
        for name, default in (("socket_timeout", 5.0), ("client_name", "gw_celery-watch")):
            if options.get(name) is None:
                options[name] = default
        # redis-py's own PING fails on a subscriber, whose answer differs. The error would end the
        # worker after a pause with all slots in use. `_probe` checks this connection instead.
        options["health_check_interval"] = 0
        self._link = pool.connection_class(**options)
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
        except ResponseError as exc:
            self._channel.pause(exc)
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


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same on the master that Sentinel names."""


class Transport(redis.Transport):
    """The transport of the consumer in a worker with the GPU pool."""

    Channel = Channel


class SentinelTransport(redis.SentinelTransport):
    """The same for URLs of Sentinel."""

    Channel = SentinelChannel


_OURS = {redis.Transport: Transport, redis.SentinelTransport: SentinelTransport}


class Connection(kombu.Connection):  # type: ignore[name-defined]
    """A connection with our transport; it keeps kombu's transport name for Flower."""

    #: The holds of the worker that consumes over this connection.
    holds: holds.Holds

    def get_transport_cls(self) -> Any:
        transport = super().get_transport_cls()
        return _OURS.get(transport, transport)

    def clone(self, **kwargs: Any) -> Any:
        cloned = super().clone(**kwargs)
        cloned.holds = self.holds
        return cloned


def use(connection: Any, held: holds.Holds) -> Any:
    """Return an unconnected copy of a Redis connection, with our transport; others unchanged."""
    if connection.get_transport_cls() not in _OURS:
        return connection
    ours = Connection(**connection.info())
    ours.holds = held
    return ours
