"""What workers hold on a Redis broker, for operators: listed, and given back for lost workers.

It needs no worker, so that a project can return to Celery's own pools.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from redis.exceptions import ResponseError

from gw_celery.cluster import early_acks, liveness, lost_workers
from gw_celery.transport import find, holds, refusals

#: Seconds that each answer of Redis may take.
_TIMEOUT = 5.0
_BEATS = "return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')"
#: Seconds between two readings of the heartbeats.
_PERIOD = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """The messages that one incarnation of a worker holds."""

    incarnation: str
    messages: int
    #: Seconds since its last heartbeat; ``None`` if it has left or was declared lost.
    silent: float | None
    is_lost: bool


class Holders:
    """The holds of all workers of an app.

    Args:
        app: the Celery app.
        ttl: seconds without a heartbeat after which a worker is lost.
    """

    def __init__(self, app: Any, broker: find.BrokerRedis, ttl: float) -> None:
        self._app = app
        self._broker = broker
        self._ttl = ttl
        self._alive = broker.key("alive")

    def listed(self) -> list[Held]:
        """Return what each worker holds, by name."""
        client, prefix = self._broker.client(), holds.key(self._broker.prefix, "")
        server, beats = self._beats()
        found = []
        for key in client.scan_iter(match=f"{_literal(prefix)}*"):
            try:
                incarnation = key.decode().removeprefix(prefix)
            except UnicodeDecodeError:
                continue  # no worker has this name
            beat = beats.get(incarnation)
            held = Held(
                incarnation=incarnation,
                messages=_length(client, key),
                silent=None if beat is None else max(0.0, server - float(beat)),
                is_lost=bool(client.exists(holds.tombstone(self._broker.prefix, incarnation))),
            )
            found.append(held)
        return sorted(found, key=lambda held: held.incarnation)

    def reclaim(self) -> dict[str, int]:
        """Give the messages of lost workers back to their queues; it watches for one ttl.

        Early acknowledged inputs of lost workers are answered as failed.

        Returns:
            The number of messages by incarnation.
        """
        before = self._watch()
        _, after = self._beats()
        given = {}
        beating = {early_acks.start_of(name) for name in after if after[name] != before.get(name)}
        for held in self.listed():
            name = held.incarnation
            # Without any heartbeat, it was lost with data of Redis.
            if held.is_lost or self._declare(name, before.get(name, b"")):
                given[name] = held.messages
        answering = lost_workers.LostWorkers(self._app, f"gw-holds:{uuid.uuid4().hex}", _TIMEOUT)
        answering.answer({name: early_acks.start_of(name) in beating for name in given})
        for name in answering.answered:
            self._broker.client().zrem(self._alive, name)
        return given

    def _watch(self) -> dict[str, bytes]:
        """Return the heartbeats of one ttl ago, during which Redis answered without a gap."""
        trust, before = liveness.Trust(self._ttl), None
        while True:
            own = holds.now()
            server, beats = self._beats()
            is_trusted = trust.beat(own, server)
            if before is None or trust.since == own:
                before = beats
            if is_trusted:
                return before
            time.sleep(_PERIOD)

    def _declare(self, incarnation: str, beat: bytes) -> bool:
        return liveness.declare(self._broker, incarnation, beat, "gw holds") > 0

    def _beats(self) -> tuple[float, dict[str, bytes]]:
        """Return Redis's time and the last heartbeats."""
        client = self._broker.client()
        seconds, microseconds = client.time()
        # A script returns each time as the text that the script of a declaration compares.
        flat = client.eval(_BEATS, 1, self._alive)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return seconds + microseconds / 1e6, {
            name.decode(errors="replace"): beat for name, beat in pairs
        }


def _length(client: Any, key: bytes) -> int:
    try:
        return int(client.hlen(key))
    except ResponseError as exc:
        if not refusals.is_wrong_type(exc):
            raise
        return 0  # giving it back deletes this key


def holders(app: Any, ttl: float) -> Holders | None:
    """Return the holders of an app; ``None`` if its broker is not a Redis."""
    broker = find.redis_of(app, _TIMEOUT)
    return Holders(app, broker, ttl) if isinstance(broker, find.BrokerRedis) else None


def _literal(prefix: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in prefix)
