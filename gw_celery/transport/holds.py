"""The messages that a worker has taken from a Redis broker and not answered: its holds.

Redis keeps them in one hash for each incarnation of a worker; see ``cluster.liveness``. The name of
a hold, ``<incarnation>/<number>``, is the delivery tag of its message: an acknowledgement names
the delivery that it belongs to, and a worker that wakes up late cannot acknowledge the next one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.exceptions import ResponseError

from gw_celery.protocol import headers
from gw_celery.transport import find, refusals

logger = logging.getLogger(__name__)

#: Takes messages, and holds each in the same step. KEYS: the hash of the worker's holds, its
#: tombstone, then the lists. ARGV: first number, maximum messages, maximum bytes, number of lists
#: that take turns. Answer: the index of its list and the message, for each message; for a key that
#: is not a list its negative index and the error.
TAKE = """
local first, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local largest, width = tonumber(ARGV[3]), tonumber(ARGV[4])
if redis.call('EXISTS', KEYS[2]) == 1 then return redis.error_reply('GWDEAD declared lost') end
redis.call('HLEN', KEYS[1])
local taken, broken, count, size = {}, {}, 0, 0
for start = 3, #KEYS, width do
  local found = true
  while found and count < most and size < largest do
    found = false
    for at = start, math.min(start + width - 1, #KEYS) do
      local item = count < most and size < largest and not broken[at]
      if item then item = redis.pcall('RPOP', KEYS[at]) end
      if type(item) == 'table' then
        if not string.find(item.err, '^WRONGTYPE') then return item end
        broken[at] = true
        table.insert(taken, 2 - at)
        table.insert(taken, item.err)
      elseif item then
        local held = redis.pcall('HSET', KEYS[1], first + count, KEYS[at] .. '\\n' .. item)
        if type(held) == 'table' then  -- an access rule refuses it
          redis.call('RPUSH', KEYS[at], item)
          return held
        end
        found, count, size = true, count + 1, size + #item
        table.insert(taken, at - 2)
        table.insert(taken, item)
      end
    end
  end
end
return taken
"""
#: Returns a message to its list, unless the hold is gone. KEYS: holds, list. ARGV: number, message,
#: command. It pushes first: if the server refuses that, nothing has changed.
GIVE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[1], '')  -- if an access rule refuses this, nothing has changed yet
redis.call(ARGV[3], KEYS[2], ARGV[2])
return redis.call('HDEL', KEYS[1], ARGV[1])
"""
#: Holds that are given back in one round trip.
_PAGE = 500
#: No number of a hold has as many digits.
_DIGITS = 19

# Linux's CLOCK_BOOTTIME continues while the machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Return the seconds of a clock that is never set."""
    return time.clock_gettime(_CLOCK)


def key(prefix: str, incarnation: str) -> str:
    """Return the key of the holds of an incarnation; its fields are their numbers."""
    return f"{prefix}gw:hold:{incarnation}"


def tombstone(prefix: str, incarnation: str) -> str:
    """Return the key that exists once an incarnation was declared lost."""
    return f"{prefix}gw:dead:{incarnation}"


class Holds:
    """The holds of one worker; its consumer and the thread of its heartbeats share it.

    Args:
        start: identifies this start of the worker.
        ttl: seconds without a heartbeat after which the worker may be declared lost.
    """

    def __init__(self, start: str, ttl: float) -> None:
        self.start = start
        self.ttl = ttl
        self._life = 0
        self._next = 1
        #: Acknowledged names that Redis still has; the consumer's channel deletes them.
        self.acknowledged: list[str] = []
        #: The channel of the consumer; ``None`` while it is not connected.
        self.channel: Any = None
        #: Returns the names of the holds whose inputs the pool has.
        self.in_use: Callable[[], Iterable[str]] = tuple
        #: Time by ``now`` until which no other worker can have declared this one lost.
        self.fresh_until = math.inf
        #: Why Redis refuses to give messages; ``""`` while it does not.
        self.refusal = ""
        #: Whether this worker was declared lost, and its pool has not reacted.
        self.is_lost = False

    @property
    def incarnation(self) -> str:
        """This worker's name in Redis; it changes after the worker was declared lost."""
        return f"{self.start}.{self._life}"

    @property
    def is_fresh(self) -> bool:
        """Whether the holds are certainly this worker's; otherwise it must start nothing."""
        return now() < self.fresh_until

    @property
    def outage(self) -> str:
        """Why the broker gives no messages, or why no input may start; ``""`` if there is none."""
        if self.is_fresh:
            return self.refusal
        late = now() - self.fresh_until + self.ttl
        return f"no heartbeat has reached Redis for {late:.0f} s, so that no input may start"

    def begin_anew(self) -> None:
        """Take a new incarnation, because this one was declared lost."""
        self._life += 1
        self.is_lost = True

    def allot(self, count: int) -> int:
        """Return the first of ``count`` unused numbers."""
        first, self._next = self._next, self._next + count
        return first

    def refuse(self, exc: Exception) -> None:
        """Record that Redis refuses to give messages, and log it once."""
        if not self.refusal:
            logger.warning("Redis refuses to give messages: %r; tried again until it works", exc)
        self.refusal = f"{type(exc).__name__}: {exc}"

    def serve(self) -> None:
        """Record that Redis gives messages."""
        if self.refusal:
            logger.warning("Redis gives messages again, after: %s", self.refusal)
            self.refusal = ""


def name(incarnation: str, number: int) -> str:
    return f"{incarnation}/{number}"


def parts(named: str) -> tuple[str, int] | None:
    """Return the incarnation and the number of a name; ``None`` if it names no hold."""
    incarnation, _, number = named.rpartition("/")
    return (incarnation, int(number)) if incarnation and number.isdigit() else None


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the numbers of holds by incarnation."""
    groups: dict[str, list[str]] = {}
    for named in names:
        incarnation, _, number = named.rpartition("/")
        groups.setdefault(incarnation, []).append(number)
    return groups


def give_back(
    client: Any,
    held_in: str,
    numbers: Iterable[int],
    *,
    command: str = "RPUSH",
    is_lost: bool = False,
) -> int:
    """Return messages to their lists, newest first, so that the oldest is taken next.

    Args:
        client: adds no prefix to keys.
        held_in: key of the holds.
        numbers: of the holds; those that are gone are ignored.
        command: ``RPUSH`` puts a message where it is taken next, ``LPUSH`` behind all others.
        is_lost: whether to count the delivery, because its worker was lost.

    Returns:
        The number of messages.

    Raises:
        ResponseError: if Redis refuses some, such as for a queue that is no list; the others are
            returned.
    """
    refusal: Exception | None = None
    given, waiting = 0, sorted(numbers, reverse=True)
    while waiting:
        page, waiting = waiting[:_PAGE], waiting[_PAGE:]
        lists = []
        with client.pipeline(transaction=False) as pipe:
            for number, held in zip(page, client.hmget(held_in, page), strict=True):
                listed, is_hold, message = (held or b"").partition(b"\n")
                if is_hold:
                    again = _again(message, is_lost=is_lost)
                    pipe.eval(GIVE, 2, held_in, listed, number, again, command)
                    lists.append(listed)
                elif held is not None:
                    _remove_foreign(client, held_in, number)
            answers = pipe.execute(raise_on_error=False)
        for listed, answer in zip(lists, answers, strict=True):
            if not isinstance(answer, Exception):
                given += answer
            elif refusals.is_wrong_type(answer):
                queue = listed.decode(errors="replace")
                refusal = ResponseError(f"{queue} is not a list, messages wait for it: {answer}")
            else:
                refusal = answer
    if refusal is not None:
        raise refusal
    return given


def _again(message: bytes, *, is_lost: bool) -> bytes | str:
    """Return a message as it is delivered again; one that cannot be read stays as it is."""
    try:
        payload = loads(bytes_to_str(message))
        payload["properties"]["delivery_info"]["redelivered"] = True
        found = payload["headers"]
        found["redelivered"] = True
        if is_lost:
            found[headers.DELIVERIES] = int(found.get(headers.DELIVERIES) or 0) + 1
        again: str = dumps(payload)
    except Exception:
        return message
    return again


def numbers_of(client: Any, held_in: str) -> Sequence[int]:
    """Return the numbers of all holds under a key; remove what is none."""
    numbers = []
    for field in find.fields(client, held_in):
        if field.isdigit() and len(field) < _DIGITS:
            numbers.append(int(field))
        else:
            _remove_foreign(client, held_in, field)
    return numbers


def _remove_foreign(client: Any, held_in: str, field: Any) -> None:
    client.hdel(held_in, field)
    logger.error("the field %.100r of %s holds no message: it is deleted", field, held_in)
