"""What the workers of a service know of one another: a hash in Redis for each service.

Each worker writes its facts under its node name, with the time by the clock of Redis, and reads
those of the others. What is too old is of a worker that was killed, or cannot reach Redis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from gw_celery.cluster import records

logger = logging.getLogger(__name__)

#: Seconds after which facts are too old, at least; and in rounds.
_PATIENCE = 10.0
_PATIENT_ROUNDS = 4
#: Seconds after which the facts of a worker that is gone are removed.
_FORGET = 600.0
#: Workers that write once a second together would not be too many.
_WORKERS_A_SECOND = 100


class Peers:
    """This worker's facts in Redis, and those of the others.

    Args:
        client: a Redis client that puts no prefix before keys.
        prefix: what this app's keys begin with.
        names: the name of the hash of each service: workers that consume the same share it.
    """

    def __init__(self, client: Any, prefix: str, names: Mapping[str, str], me: str) -> None:
        self._client = client
        self._keys = {service: f"{prefix}gw:scale:{name}" for service, name in names.items()}
        self._me = me
        #: What the clock of Redis shows when ours shows 0.
        self._offset: float | None = None
        self._known: dict[str, tuple[records.Facts, ...]] = {}
        self._next = 0.0

    def exchange(self, mine: Mapping[str, records.Facts]) -> dict[str, tuple[records.Facts, ...]]:
        """Write ``mine`` and return the others' by service; seldom where there are many."""
        if time.monotonic() < self._next:
            return self._known
        if self._offset is None:
            self._offset = _clock(self._client.time()) - time.monotonic()
        at = self._offset + time.monotonic()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for service, key in self._keys.items():
                if service in mine:
                    pipe.hset(key, self._me, mine[service].dumps(at))
                pipe.expire(key, int(_FORGET))
                pipe.hgetall(key)
            seconds, *answers = pipe.execute()
        self._offset = _clock(seconds) - time.monotonic()
        hashes = [answer for answer in answers if isinstance(answer, dict)]
        self._follow(dict(zip(self._keys, hashes, strict=True)), _clock(seconds))
        return self._known

    def leave(self) -> None:
        """Have the others forget this worker at once."""
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._keys.values():
                pipe.hdel(key, self._me)
            pipe.execute()

    def _follow(self, hashes: Mapping[str, Mapping[bytes, bytes]], now: float) -> None:
        most = max(map(len, hashes.values()), default=0)
        period = max(1.0, most / _WORKERS_A_SECOND)
        # A little less than the round, which would else be every second one.
        self._next = time.monotonic() + 0.9 * period
        patience = max(_PATIENCE, _PATIENT_ROUNDS * period)
        self._known = {
            service: self._read(service, listed, now, patience)
            for service, listed in hashes.items()
        }

    def _read(
        self, service: str, listed: Mapping[bytes, bytes], now: float, patience: float
    ) -> tuple[records.Facts, ...]:
        found, forgotten = [], []
        for name, written in sorted(listed.items()):
            if name.decode() == self._me:
                continue
            try:
                told, at = records.loads(written)
            except (ValueError, TypeError, RecursionError) as exc:
                logger.debug("the facts of %r cannot be read: %s", name, exc)
                forgotten.append(name)
                continue
            age = abs(now - at)  # after a clock was set back, what is ahead of it is as old
            if age < patience:
                found.append(told)
            elif age > _FORGET:
                forgotten.append(name)
        if forgotten:
            self._client.hdel(self._keys[service], *forgotten)
        return tuple(found)


def _clock(answer: tuple[int, int]) -> float:
    seconds, microseconds = answer
    return seconds + microseconds / 1e6
