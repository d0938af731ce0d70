"""Heartbeats and lost workers: each worker's parent beats once a second, by Redis's clock.

A worker without a heartbeat for one ttl is declared lost, by a worker that may trust its own clock
and connection. No key lifetime decides this: after a long outage, all workers would be lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from redis import exceptions

from gw_celery.cluster import early_acks
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: Seconds for which a tombstone is kept.
TOMBSTONE = 7 * 86_400
#: Seconds after which the keys of an unused project expire.
FORGET = 7 * 86_400

#: Writes a heartbeat and the worker's record. Returns the time and the silent workers, or the
#: worker that declared this one lost. KEYS: alive, own tombstone, records; ARGV: own name, ttl, own
#: record. A heartbeat more than a ttl ahead was written before the clock was set back.
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
#: Declares a worker lost and deletes its record, unless it has beaten since its heartbeat was read.
#: Returns 1 if this call declared it, 2 if it was declared before, else 0. KEYS: alive, its
#: tombstone, records; ARGV: its name, the heartbeat, the own name, lifetime of the tombstone.
DECLARE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 2 end
if redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
_DECLARED, _WAS_DECLARED = 1, 2

#: Parts of a ttl: maximum time between two heartbeats, maximum drift of Redis's clock.
_LONGEST_GAP = 1 / 3
_LARGEST_SHIFT = 1 / 10

# Linux's CLOCK_BOOTTIME continues while the machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Return the seconds of a clock that is never set."""
    return time.clock_gettime(_CLOCK)


class Trust:
    """Decides whether a worker may declare others lost, or may have been away itself.

    Its heartbeats must have had no gap, and Redis's clock must have matched its own, for one ttl.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._since: float | None = None
        self._last = self._offset = 0.0

    def beat(self, own: float, server: float) -> bool:
        """Record a successful heartbeat; return whether silent workers may be declared lost now.

        Args:
            own: the time of sending, by ``now``.
            server: the time of arrival, by Redis's clock.
        """
        has_gap = own - self._last > self._ttl * _LONGEST_GAP
        has_shift = abs(server - own - self._offset) > self._ttl * _LARGEST_SHIFT
        if self._since is None or has_gap or has_shift:
            self._since, self._offset = own, server - own
        self._last = own
        return own - self._since > self._ttl


class Beats:
    """The heartbeats of one worker, and its handling of silent workers.

    Args:
        shared: the Redis that all workers share.
        start: start id of this worker.
        ttl: seconds without a heartbeat after which a worker is silent.
        lost: stores the failures of lost workers; ``None`` if there are none to store.
        may_declare: whether silent workers are declared lost.
    """

    def __init__(
        self,
        shared: find.SharedRedis,
        start: str,
        ttl: float,
        lost: early_acks.LostInputs | None,
        *,
        may_declare: bool,
    ) -> None:
        #: Sorted set: incarnations, by the time of their last heartbeat.
        self.alive = shared.key("alive")
        #: Hash: incarnation -> worker record.
        self.records = shared.key("records")
        #: Incarnation -> last heartbeat, of workers that are silent for more than a ttl.
        self.silent: dict[str, bytes] = {}
        self._shared = shared
        self._start = start
        self._life = 0
        self._ttl = ttl
        self._lost = lost
        self._may_declare = may_declare
        self._trust = Trust(ttl)
        #: Hash of the heartbeat's script on this connection.
        self.script = ""
        self._has_scripts = True
        self._sent_at = 0.0

    @property
    def incarnation(self) -> str:
        """This worker's name in Redis; it changes after the worker was declared lost."""
        return f"{self._start}.{self._life}"

    def ask(self, client: Any, pipe: Any, record: str) -> None:
        """Write a heartbeat, with the worker's record, into a pipeline of ``client``."""
        if self._has_scripts and not self.script:
            try:
                self.script = client.script_load(BEAT)
            except Exception as exc:
                self._do_without_scripts(exc)
        self._sent_at = now()
        if self._has_scripts:
            keys = self._keys(self.incarnation)
            pipe.evalsha(self.script, len(keys), *keys, self.incarnation, self._ttl, record)

    def follow(self, client: Any, answers: Iterator[Any], record: str) -> bool:
        """Process the answer to a heartbeat; return False if this worker was declared lost."""
        answer = next(answers) if self._has_scripts else None
        if isinstance(answer, Exception):
            self._do_without_scripts(answer)
            answer = None
        if answer is None:
            answer = self._beat_without_script(client, record)
        if answer[0] == b"dead":
            self._begin_anew(answer[1].decode())
            return False
        server, listed = float(answer[0]), [*answer[1], *answer[2]]
        is_trusted = self._trust.beat(self._sent_at, server)
        self.silent = dict(zip(map(bytes.decode, listed[::2]), listed[1::2], strict=True))
        # First, so that these workers are not handled again.
        while self._lost is not None and self._lost.answered:
            answered = self._lost.answered.popleft()
            client.zrem(self.alive, answered)
            self.silent.pop(answered, None)
        if is_trusted and self._may_declare:
            for incarnation, beat in self.silent.items():
                is_late = abs(server - float(beat)) > 2 * self._ttl
                self._declare(client, incarnation, beat, is_late=is_late)
        return True

    def leave(self, pipe: Any) -> None:
        """Remove this worker from the records, so that others do not count on it."""
        pipe.hdel(self.records, self.incarnation)
        if self._lost is None or not self._lost.has_own():
            pipe.zrem(self.alive, self.incarnation)

    def _keys(self, incarnation: str) -> tuple[str, str, str]:
        """Return the keys of the scripts; the second is the tombstone."""
        return (self.alive, self._shared.key("dead", incarnation), self.records)

    def _beat_without_script(self, client: Any, record: str) -> list[Any]:
        """Do the same as ``BEAT`` with single commands."""
        alive, tombstone, records = self._keys(self.incarnation)
        if (declarer := client.get(tombstone)) is not None:
            return [b"dead", declarer]
        seconds, microseconds = client.time()
        server = seconds + microseconds / 1e6
        with client.pipeline(transaction=False) as pipe:
            pipe.zadd(alive, {self.incarnation: f"{server:.3f}"})
            pipe.hset(records, self.incarnation, record)
            pipe.zrangebyscore(alive, "-inf", f"({server - self._ttl:.3f}", withscores=True)
            pipe.zrangebyscore(alive, f"({server + self._ttl:.3f}", "+inf", withscores=True)
            *_, old, ahead = pipe.execute()
        flat = [[part for pair in listed for part in pair] for listed in (old, ahead)]
        return [f"{server:.3f}", *flat]

    def _do_without_scripts(self, exc: Exception) -> None:
        """Continue where access rules, a cluster or a renamed command prevent scripts."""
        refused = (exceptions.NoPermissionError, exceptions.ClusterCrossSlotError)
        texts = ("CROSSSLOT", "unknown command")  # redis-py 5 has a class for neither
        if not isinstance(exc, refused) and not str(exc).startswith(texts):
            raise exc
        self._has_scripts = self._may_declare = False
        logger.warning(
            "Redis refuses scripts: %s. Until its restart this worker declares no other one lost: "
            "allow SCRIPT LOAD, EVALSHA and EVAL, then restart the worker",
            exc,
        )

    def _begin_anew(self, declarer: str) -> None:
        self._life += 1
        self._trust = Trust(self._ttl)
        logger.error(
            "%s has declared this worker lost: this worker was frozen or could not reach Redis for "
            "over %.0f s. Its acknowledged inputs are answered as failed. It continues as %s",
            declarer,
            self._ttl,
            self.incarnation,
        )

    def _declare(self, client: Any, incarnation: str, beat: bytes, *, is_late: bool) -> None:
        """Declare a worker lost, once, and take its inputs, also if its declarer did not.

        Its entry among the heartbeats stays until all is done, so that another worker can continue
        if this one is lost.
        """
        keys = self._keys(incarnation)
        arguments = (incarnation, beat, self.incarnation, TOMBSTONE)
        result = client.eval(DECLARE, len(keys), *keys, *arguments)
        if result == _DECLARED:
            logger.warning(
                "worker %s is lost: it has not been seen for %.0f s (setting gw_worker_ttl)",
                *(incarnation, self._ttl),
            )
        elif result != _WAS_DECLARED or not is_late:
            return
        if self._lost is None or (result == _WAS_DECLARED and self._goes_on(client, incarnation)):
            client.zrem(self.alive, incarnation)
        else:
            self._lost.take(incarnation)

    def _goes_on(self, client: Any, incarnation: str) -> bool:
        """Return whether a worker that was declared lost continues and runs its inputs."""
        beating = {name.decode() for name in client.zrange(self.alive, 0, -1)} - set(self.silent)
        return early_acks.start_of(incarnation) in map(early_acks.start_of, beating)
