"""Heartbeats and lost workers: each worker's parent beats once a second, by Redis's clock.

A worker without a heartbeat for one ttl is declared lost, by a worker that may trust its own clock
and connection. No key lifetime decides this: after a long outage, all workers would be lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from gw_celery.cluster import early_acks, lost_workers
from gw_celery.transport import find, holds

logger = logging.getLogger(__name__)

#: Seconds after which the records of an unused project expire.
FORGET = 7 * 86_400
#: Seconds for which the tombstone of a worker that has left is kept.
_LEFT = 60

#: Writes a heartbeat and the worker's record. Returns the time and the silent workers, or the
#: worker that declared this one lost. KEYS: alive, own tombstone, records; ARGV: own name, ttl, own
#: record. A heartbeat more than a ttl ahead was written before the clock was set back.
BEAT = """
if redis.call('EXISTS', KEYS[2]) == 1 then
  local declarer = redis.pcall('GET', KEYS[2])
  return {'dead', type(declarer) == 'string' and declarer or '?'}
end
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
#: Declares a worker lost and deletes its record, unless it has beaten since its heartbeat was read.
#: Returns 1 if this call declared it, 2 if it was declared before, else 0. KEYS: alive, its
#: tombstone, records; ARGV: its name, the heartbeat ('' for none), the own name, lifetime of the
#: tombstone.
DECLARE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 2 end
if (redis.call('ZSCORE', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
_DECLARED, _WAS_DECLARED = 1, 2

#: Parts of a ttl: maximum time between two heartbeats, maximum drift of Redis's clock.
_LONGEST_GAP = 1 / 3
_LARGEST_SHIFT = 1 / 10


def declare(shared: find.SharedRedis, incarnation: str, beat: bytes, declarer: str) -> int:
    """Declare a worker lost if ``beat`` is still its last heartbeat; see ``DECLARE``."""
    keys = _keys(shared, incarnation)
    arguments = (incarnation, beat, declarer, lost_workers.TOMBSTONE)
    return int(shared.client().eval(DECLARE, len(keys), *keys, *arguments))


def _keys(shared: find.SharedRedis, incarnation: str) -> tuple[str, str, str]:
    tombstone = holds.tombstone(shared.prefix, incarnation)
    return (shared.key("alive"), tombstone, shared.key("records"))


class Trust:
    """Decides whether a worker may declare others lost, or may have been away itself.

    Its heartbeats must have had no gap, and Redis's clock must have matched its own, for one ttl.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        #: Time of the heartbeat after the last gap.
        self.since: float | None = None
        self._last = self._offset = 0.0

    def beat(self, own: float, server: float) -> bool:
        """Record a successful heartbeat; return whether silent workers may be declared lost now.

        Args:
            own: the time of sending, by ``holds.now``.
            server: the time of arrival, by Redis's clock.
        """
        has_gap = own - self._last > self._ttl * _LONGEST_GAP
        has_shift = abs(server - own - self._offset) > self._ttl * _LARGEST_SHIFT
        if self.since is None or has_gap or has_shift:
            self.since, self._offset = own, server - own
        self._last = own
        return own - self.since > self._ttl


class Beats:
    """The heartbeats of one worker, and its handling of silent workers.

    Args:
        shared: the Redis that all workers share.
        held: has this worker's name, and learns of its heartbeats.
        lost: answers for lost workers.
    """

    def __init__(
        self, shared: find.SharedRedis, held: holds.Holds, lost: lost_workers.LostWorkers
    ) -> None:
        #: Sorted set: incarnations, by the time of their last heartbeat.
        self.alive = shared.key("alive")
        #: Hash: incarnation -> worker record.
        self.records = shared.key("records")
        #: Incarnation -> last heartbeat, of workers that are silent for more than a ttl.
        self.silent: dict[str, bytes] = {}
        self._shared = shared
        self._held = held
        self._ttl = held.ttl
        self._lost = lost
        self._trust = Trust(held.ttl)
        #: Hash of the heartbeat's script on this connection.
        self.script = ""
        self._sent_at = 0.0

    def ask(self, client: Any, pipe: Any, record: str) -> None:
        """Write a heartbeat, with the worker's record, into a pipeline of ``client``."""
        if not self.script:
            self.script = client.script_load(BEAT)
        self._sent_at = holds.now()
        own = self._held.incarnation
        keys = _keys(self._shared, own)
        pipe.evalsha(self.script, len(keys), *keys, own, self._ttl, record)

    def follow(self, client: Any, answers: Iterator[Any]) -> bool:
        """Process the answer to a heartbeat; return False if this worker was declared lost."""
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        if answer[0] == b"dead":
            # Others look once more for what it held without knowing of the tombstone.
            client.zadd(self.alive, {self._held.incarnation: 0})
            self._begin_anew(answer[1].decode(errors="replace"))
            return False
        if isinstance(self._shared, find.BrokerRedis):
            self._held.fresh_until = self._sent_at + self._ttl
        server, listed = float(answer[0]), [*answer[1], *answer[2]]
        is_trusted = self._trust.beat(self._sent_at, server)
        self.silent = self._named(client, dict(zip(listed[::2], listed[1::2], strict=True)))
        # First, so that these workers are not handled again.
        while self._lost.answered:
            answered = self._lost.answered.popleft()
            client.zrem(self.alive, answered)
            self.silent.pop(answered, None)
        if is_trusted:
            for incarnation, beat in self.silent.items():
                is_late = abs(server - float(beat)) > 2 * self._ttl
                self._declare(client, incarnation, beat, is_late=is_late)
        return True

    def _named(self, client: Any, silent: dict[bytes, bytes]) -> dict[str, bytes]:
        """Return silent workers by name; remove heartbeats that no worker has written."""
        named = {}
        for incarnation, beat in silent.items():
            try:
                named[incarnation.decode()] = beat
            except UnicodeDecodeError:
                client.zrem(self.alive, incarnation)
                logger.error("the heartbeat %.100r is no worker's: it is deleted", incarnation)
        return named

    def remove_foreign(self, client: Any) -> None:
        """Delete the shared keys that something else has written with another type."""
        for key, kind in ((self.alive, "zset"), (self.records, "hash")):
            find.remove_foreign(client, key, kind)

    def leave(self, client: Any) -> None:
        """Give back what this worker still holds, and remove it from the records.

        Its heartbeat stays where something is left, so that another worker answers for that.
        """
        own, prefix = self._held.incarnation, self._shared.prefix
        client.hdel(self.records, own)
        # A command to take messages that is still on its way takes none.
        client.set(holds.tombstone(prefix, own), own, ex=_LEFT, nx=True)
        held_in = holds.key(prefix, own)
        numbers = holds.numbers_of(client, held_in)
        if done := holds.grouped(self._held.acknowledged).get(own):
            client.hdel(held_in, *done)
        given = holds.give_back(client, held_in, numbers)
        if given:
            logger.info("%d unfinished messages are back in their queues", given)
        if self._lost.early is None or not self._lost.early.has_own():
            client.zrem(self.alive, own)

    def _begin_anew(self, declarer: str) -> None:
        self._held.begin_anew()
        self._trust = Trust(self._ttl)
        logger.error(
            "%s has declared this worker lost: this worker was frozen or could not reach Redis for "
            "over %.0f s. Its inputs run elsewhere and are stopped here. It continues as %s",
            *(declarer, self._ttl, self._held.incarnation),
        )

    def _declare(self, client: Any, incarnation: str, beat: bytes, *, is_late: bool) -> None:
        """Declare a worker lost, once, and take its inputs, also if its declarer did not.

        Its entry among the heartbeats stays until all is done, so that another worker can continue
        if this one is lost.
        """
        result = declare(self._shared, incarnation, beat, self._held.incarnation)
        if result == _DECLARED:
            logger.warning(
                "worker %s is lost: it has not been seen for %.0f s (setting gw_worker_ttl)",
                *(incarnation, self._ttl),
            )
        elif result != _WAS_DECLARED or not is_late:
            return
        goes_on = result == _WAS_DECLARED and self._goes_on(client, incarnation)
        self._lost.take(incarnation, goes_on=goes_on)

    def _goes_on(self, client: Any, incarnation: str) -> bool:
        """Return whether a worker that was declared lost continues and runs its inputs."""
        alive = client.zrange(self.alive, 0, -1)
        beating = {name.decode(errors="replace") for name in alive} - set(self.silent)
        return early_acks.start_of(incarnation) in map(early_acks.start_of, beating)
