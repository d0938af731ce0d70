"""Which workers of a project live: each beats once a second, by the clock of the shared Redis.

One that has not beaten for a ttl is declared lost by one that has good reason to trust itself.
Nothing here depends on the lifetime of a key: after an outage longer than that, all would be lost.
"""

from __future__ import annotations

import time
from typing import Any

#: Seconds that a tombstone is kept.
TOMBSTONE = 7 * 86_400
#: Seconds after which the last beat of a project that is used no more is forgotten.
FORGET = 7 * 86_400

#: Beat, and write the own record. Returns the time, and the workers that are silent; or who
#: declared this one lost. KEYS: alive, own tombstone, records; ARGV: own name, ttl, own record.
#: A beat that is further ahead than a ttl is from before the clock was set back.
BEAT = """
local declarer = redis.call('GET', KEYS[2])
if declarer then return {'dead', declarer} end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZADD', KEYS[1], string.format('%.3f', now), ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
local oldest = string.format('(%.3f', now - ARGV[2])
local newest = string.format('(%.3f', now + ARGV[2])
return {
  string.format('%.3f', now),
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', oldest, 'WITHSCORES'),
  redis.call('ZRANGEBYSCORE', KEYS[1], newest, '+inf', 'WITHSCORES'),
}
"""
#: Declare a worker lost, unless it has beaten since its beat was read; its record goes. Returns 1
#: when this call did it, 2 when it was done, else 0. KEYS: alive, its tombstone, records; ARGV: its
#: name, the beat that was read, the own name, the seconds to keep the tombstone for.
DECLARE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 2 end
if redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
DECLARED, WAS_DECLARED = 1, 2

#: Parts of a ttl: the longest time between two beats, and how far Redis's clock may run off.
_LONGEST_GAP = 1 / 3
_LARGEST_SHIFT = 1 / 10

#: Linux's counts on while the machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def beat(
    client: Any, keys: tuple[str, str, str], name: str, ttl: float, record: str | bytes
) -> list[Any]:
    """Do what ``BEAT`` does in single commands, where scripts are refused, and return the same."""
    alive, tombstone, records = keys
    if (declarer := client.get(tombstone)) is not None:
        return [b"dead", declarer]
    seconds, microseconds = client.time()
    server = seconds + microseconds / 1e6
    with client.pipeline(transaction=False) as pipe:
        pipe.zadd(alive, {name: f"{server:.3f}"})
        pipe.hset(records, name, record)
        pipe.zrangebyscore(alive, "-inf", f"({server - ttl:.3f}", withscores=True)
        pipe.zrangebyscore(alive, f"({server + ttl:.3f}", "+inf", withscores=True)
        *_, old, ahead = pipe.execute()
    flat = [[part for pair in listed for part in pair] for listed in (old, ahead)]
    return [f"{server:.3f}", *flat]


def is_refusal(exc: Exception) -> bool:
    """Whether an access list, a cluster or a renamed command keeps a Redis from scripts."""
    from redis import exceptions  # here: half of the package's import time

    refused = (exceptions.NoPermissionError, exceptions.ClusterCrossSlotError)
    return isinstance(exc, refused) or str(exc).startswith("unknown command")


def now() -> float:
    """Return the seconds of a clock that is never set."""
    return time.clock_gettime(_CLOCK)


class Trust:
    """Whether a worker may declare others lost: it must not be the one that was away.

    Its own beats had no gap, and Redis's clock ran like its own, for a whole ttl.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._since: float | None = None
        self._last = self._offset = 0.0

    def beat(self, own: float, server: float) -> bool:
        """Take in one beat that succeeded; whether silent workers may be declared lost now.

        Args:
            own: when it was sent, by ``now``.
            server: when it came, by Redis's clock.
        """
        has_gap = own - self._last > self._ttl * _LONGEST_GAP
        has_shift = abs(server - own - self._offset) > self._ttl * _LARGEST_SHIFT
        if self._since is None or has_gap or has_shift:
            self._since, self._offset = own, server - own
        self._last = own
        return own - self._since > self._ttl
