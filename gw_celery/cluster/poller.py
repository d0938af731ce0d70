"""What waits in the broker for this worker's services, and who else serves them: one thread.

It has a connection of its own, for the worker's own is busy with messages, and it alone waits for
the broker: the worker's loop reads what the thread found last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery.backends.redis import RedisBackend

from gw_celery.cluster import early_acks, membership, queue_lengths, records
from gw_celery.policy import backoff
from gw_celery.transport import broker

logger = logging.getLogger(__name__)

_ROUND = 1.0
#: While nothing is loaded a message waits for the next look.
_ROUND_AT_ZERO = 0.25
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 16.0
#: What was read longer ago says nothing about now.
_STALE = 5.0
#: Workers that come together know of one another by then.
_MEETING = 2.5
#: Seconds that the end of a worker waits for the thread.
_FAREWELL = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the thread found."""

    at: float
    #: By service; ``None`` where the transport does not tell.
    lengths: Mapping[str, queue_lengths.Length] | None
    #: The other workers of each service; ``None`` without a Redis to meet in.
    peers: Mapping[str, tuple[records.Facts, ...]] | None


class Demand:
    """The thread.

    Args:
        queues: the queues of each service.
        me: this worker's node name.
        on_read: called in the thread when something has been read.
    """

    def __init__(
        self,
        app: Any,
        queues: Mapping[str, Sequence[str]],
        me: str,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._queues = queues
        self._me = me
        self._on_read = on_read
        self._mine: Mapping[str, records.Facts] = {}
        self._reading: Reading | None = None
        self._source: Source | None = None
        self._is_away = False
        #: Until then the workers that come, or come back, with this one need not be there.
        self._meets_until = 0.0
        self._last_wait = 0.0
        self._waits = backoff.Backoff(_FIRST_WAIT, _LONGEST_WAIT)
        self._is_over = threading.Event()
        self._hurry = threading.Event()
        self._is_at_zero = False
        self._thread = threading.Thread(target=self._run, name="gw-demand", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; one that waits for the broker is left behind."""
        self._is_over.set()
        self._hurry.set()
        if self._thread.is_alive():
            self._thread.join(_FAREWELL)

    def tell(self, mine: Mapping[str, records.Facts]) -> None:
        """Have the other workers know these, from the next round on."""
        self._mine = mine

    def at_zero(self, *, is_at_zero: bool) -> None:
        """Say whether nothing is loaded: a message waits for the next look then, which is soon."""
        was_at_zero, self._is_at_zero = self._is_at_zero, is_at_zero
        if is_at_zero and not was_at_zero:
            self._hurry.set()  # last: the thread asks then how long to wait

    def latest(self) -> Reading | None:
        """What was read last; ``None`` when that is too long ago, or never was."""
        reading = self._reading
        if reading is None or time.monotonic() - reading.at > _STALE:
            return None
        return reading

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._hurry.wait(self._round())
            self._hurry.clear()
        if self._source is not None:
            with contextlib.suppress(Exception):
                self._source.leave()
            self._source.close()

    def _round(self) -> float:
        """Read once; returns the seconds until the next time."""
        try:
            if self._source is None:
                self._source = Source(self._app, self._queues, self._me)
                # After an outage the others may have just begun to wait for twice as long.
                patience = min(2.0 * self._last_wait, _LONGEST_WAIT)
                self._meets_until = time.monotonic() + patience + _MEETING
            reading = self._source.read(self._mine)
            is_early = reading.peers is not None and reading.at < self._meets_until
        except Exception as exc:
            return self._went_away(exc)
        if self._is_away:
            logger.warning("the broker tells again how long the queues are")
        self._is_away = False
        self._waits.reset()
        if is_early:
            return _ROUND  # each would scale for the whole queue
        self._last_wait = 0.0
        self._reading = reading
        self._on_read()
        return _ROUND_AT_ZERO if self._is_at_zero else _ROUND

    def _went_away(self, exc: Exception) -> float:
        if not self._is_away and not self._is_over.is_set():  # once for an outage
            logger.warning(
                "the lengths of the queues cannot be read, so that the pool keeps its size: %r", exc
            )
        self._is_away = True
        if self._source is not None:
            self._source.close()
            self._source = None
        self._last_wait = self._waits.next()
        return self._last_wait


class Source:
    """One connection to the broker, and what is read over it."""

    def __init__(self, app: Any, queues: Mapping[str, Sequence[str]], me: str) -> None:
        self._connection = queue_lengths.connect(app)
        try:
            self._lengths = queue_lengths.of(self._connection, queues)
            self._peers = _peers_of(app, self._connection, queues, me)
        except BaseException:
            self.close()
            raise

    def read(self, mine: Mapping[str, records.Facts]) -> Reading:
        others = None if self._peers is None else self._peers.exchange(mine)
        counted = self._lengths.read()
        return Reading(at=time.monotonic(), lengths=counted, peers=others)

    def leave(self) -> None:
        if self._peers is not None:
            self._peers.leave()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.release()


def _peers_of(
    app: Any, connection: Any, queues: Mapping[str, Sequence[str]], me: str
) -> membership.Peers | None:
    """In the broker where it is a Redis, else in the result backend where that is one."""
    names = {service: ",".join(sorted(listed)) for service, listed in queues.items()}
    if broker.redis_transport(connection) is not None:
        channel = connection.default_channel
        return membership.Peers(
            queue_lengths.plain_client(channel), channel.global_keyprefix, names, me
        )
    if isinstance(app.backend, RedisBackend):
        prefix = early_acks.Keys.of(app.backend).prefix
        return membership.Peers(app.backend.client, prefix, names, me)
    return None
