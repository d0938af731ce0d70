"""Take many messages from Redis lists at once, each recorded as unacknowledged in the same step.

kombu pops a message and records it afterwards: a worker that is killed in between loses it, and
each message costs two round trips. A script does both for as many messages as there is room for.
It cannot wait for a message: ``redis_watch`` does, where the server can; else BRPOP, as in kombu.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from queue import Empty
from typing import Any

from kombu.asynchronous import get_event_loop
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import NoScriptError, ResponseError

from gw_celery.transport.watch import Watch

logger = logging.getLogger(__name__)

#: kombu publishes no types.
redis: Any = kombu_redis

#: KEYS: the hash of unacknowledged messages, their index, then the lists.
#: ARGV: most messages, most bytes, how many lists take turns, the queue of each list.
#: Answer: queue, tag and message for each; the tag is "" for one that has none to be found.
#: The record of a message is what kombu's restoring reads: message, exchange, routing key.
#: A tag is searched in the end of the message, where kombu writes it: parsing megabytes would keep
#: all clients waiting. A quote inside of a string is escaped, so that no text can look like one.
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
#: Messages of one answer, and their bytes: more would keep Redis and the worker's loop for long.
MOST = 32
LARGEST = 1024 * 1024


class PoppingChannel(redis.Channel):
    """A channel of kombu's Redis transport that pops many messages at once while there are some.

    Its ``QoS`` has ``recorded``, the tags that need no recording, ``forget`` and ``leave_behind``.
    """

    #: There may be messages: the last answer held one, or Redis has told of a change.
    _has_backlog = False
    #: The command of ours whose answer is to come.
    _asked: str | None = None
    #: How many messages were asked for.
    _asked_for = 0
    #: Hash of the script, as the server knows it.
    _script: str | None = None
    _may_script = True
    _watch: Watch | None = None
    _may_watch = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Consumers that do not acknowledge: what the script records would never be freed.
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

    def _update_queue_cycle(self) -> None:
        """Called when a queue comes or goes; one that comes has not been looked into."""
        super()._update_queue_cycle()
        if self._watch is not None:
            self._watch.wake()

    def _brpop_start(self, timeout: Any = None) -> None:
        """Ask for messages: for many while there are some, else wait until there is one."""
        # A lost connection may have taken an answer with it.
        self._asked = None
        queues = self.active_queues
        if not (queues and self._records()):
            super()._brpop_start(timeout)
        elif self._has_backlog:
            self._ask_for_messages(self._queue_cycle.consume(len(queues)))
        elif (watch := self._following()) is None:
            super()._brpop_start(timeout)
        elif not watch.is_waiting(time.monotonic()):
            watch.are_read()
            self._ask(
                "EXISTS", *(self._q_for_pri(queue, pri) for queue, pri in self._lists(queues))
            )

    def _lists(self, queues: list[str]) -> list[tuple[str, int]]:
        return [(queue, pri) for pri in self.priority_steps for queue in queues]

    def _ask_for_messages(self, queues: list[str]) -> None:
        lists = self._lists(queues)
        # Other orders than the default empty one queue after the other.
        width = len(queues) if self.queue_order_strategy == "round_robin" else 1
        keys = [self.unacked_key, self.unacked_index_key]
        keys += [self._q_for_pri(queue, pri) for queue, pri in lists]
        self._asked_for = self._most_to_take()
        limits = (self._asked_for, LARGEST, width)
        self._ask(
            "EVALSHA", self._script, len(keys), *keys, *limits, *(queue for queue, _ in lists)
        )

    def _ask(self, command: str, *args: Any) -> None:
        self._asked = command
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self.client.connection.send_command(command, *args)

    def _brpop_read(self, **options: Any) -> Any:
        """Deliver what was asked for; ``Empty`` when there is nothing, as in kombu."""
        if self._asked == "EVALSHA":
            return self._deliver_popped(self._read_answer() or [])
        if self._asked == "EXISTS":
            self._note_whether_there_are(self._read_answer())
            raise Empty
        try:
            answer = super()._brpop_read(**options)
        except Empty:
            self._has_backlog = False
            raise
        except self.connection_errors:
            raise
        except Exception as exc:
            # It is popped, and would end this worker; kombu knows nothing better to do with it.
            logger.critical("a message could not be read, dropped: %r", exc, exc_info=True)
            answer = True
        self._has_backlog = True
        return answer

    def _note_whether_there_are(self, filled_lists: int | None) -> None:
        if filled_lists:
            self._has_backlog = True
        elif self._watch is not None:
            self._watch.were_empty(time.monotonic())

    def _read_answer(self) -> Any:
        """Return the answer to what was asked; ``None`` when the server refuses."""
        asked, self._asked = self._asked, None
        try:
            return self.client.parse_response(self.client.connection, asked)
        except NoScriptError:
            self._script = None  # the server was restarted
            return None
        except ResponseError as exc:
            self._do_without(exc)
            return None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            getattr(self, "_flush_brpop_reauth", lambda: None)()  # kombu 5.7

    def _deliver_popped(self, taken: list[bytes]) -> bool:
        # Fewer than there was room for: the lists are empty, but for what comes just now.
        is_cut = sum(map(len, taken[2::3])) >= LARGEST
        self._has_backlog = is_cut or len(taken) >= 3 * self._asked_for
        if not taken:
            raise Empty
        messages = list(self._messages(taken))
        try:
            while messages and messages[0][0] in self.connection._callbacks:
                queue, message = messages.pop(0)
                self._queue_cycle.rotate(queue)
                self.connection._deliver(message, queue)
        finally:
            # A callback raised, or a queue was closed meanwhile.
            self._give_back([message for _, message in messages])
        return True

    def _give_back(self, messages: list[Any]) -> None:
        """Return what was not delivered, the newest first: the oldest is the next again."""
        while messages:
            tag = messages[-1]["properties"]["delivery_tag"]
            try:
                if tag in self.qos.recorded:
                    self.qos.restore_by_tag(tag)
                else:
                    self.connection._reject_inbound_message(messages[-1])
            except self.connection_errors:
                self.qos.leave_behind(message["properties"]["delivery_tag"] for message in messages)
                raise
            self.qos.recorded.discard(tag)
            messages.pop()

    def _messages(self, taken: list[bytes]) -> Iterator[tuple[str, Any]]:
        """Yield queue and message of each; one that is no message is logged and dropped."""
        for name, found, text in zip(taken[::3], taken[1::3], taken[2::3], strict=True):
            queue, tag = bytes_to_str(name), bytes_to_str(found)
            try:
                message = loads(bytes_to_str(text))
                own = redis.Channel.Message(message, channel=self).delivery_tag
                if not isinstance(own, str):
                    raise TypeError(f"its delivery_tag is {own!r}")
            except Exception as exc:
                logger.critical("not a message in %s, dropped: %r: %.200r", queue, exc, text[:200])
                self.qos.forget([tag] if tag else [])
                continue
            if tag == own:
                self.qos.recorded.add(tag)
            elif tag:
                self.qos.forget([tag])
            yield queue, message

    def _records(self) -> bool:
        """Whether messages can be recorded as they are taken."""
        # Without `recorded`, no record is acknowledged.
        if not hasattr(self.qos, "recorded") or self._careless or self.global_keyprefix:
            return False
        return self._has_script()

    def _most_to_take(self) -> int:
        """How many messages to take at once."""
        qos = self.qos
        if "can_consume" in vars(qos):  # Celery counts otherwise (worker_disable_prefetch)
            return 1
        if not qos.prefetch_count:
            return MOST
        free: int = qos.prefetch_count - len(qos._delivered) + len(qos._dirty)
        return max(1, min(MOST, free))

    def _following(self) -> Watch | None:
        """Return the watch that is told of new messages; ``None`` where there can be none."""
        hub = get_event_loop()
        if hub is None or not self._may_watch:
            return None
        try:
            if self._watch is None:
                self._watch = Watch(self._connparams(), hub, self._note_backlog)
            self._watch.follow(self.client.connection)
        except ResponseError as exc:
            self._may_watch = False
            self._close_watch()
            logger.warning(
                "Redis tells us of no new messages, so we wait as kombu does: a worker that is "
                "killed while it takes the first message after a pause may lose it (%s)",
                exc,
            )
        return self._watch

    def _note_backlog(self) -> None:
        self._has_backlog = True

    def _close_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _has_script(self) -> bool:
        if self._script is None and self._may_script:
            try:
                self._script = self._create_client().script_load(SCRIPT)
            except ResponseError as exc:
                self._do_without(exc)
        return self._script is not None

    def _do_without(self, exc: ResponseError) -> None:
        self._may_script, self._script = False, None
        logger.warning("Redis runs no scripts for us, so messages come singly: %s", exc)
