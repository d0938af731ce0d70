"""Exchanges records with the project's other workers, in one thread of the worker's parent.

It sends heartbeats, writes this worker's record, and reads the other records and queue lengths.
``policy.demand``, ``policy.speed_bands`` and ``policy.queue_time`` interpret the records.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gw_celery import background_thread
from gw_celery.cluster import liveness, lost_workers, poison_counts, queue_lengths
from gw_celery.policy import queue_time
from gw_celery.protocol import snapshot, worker_record
from gw_celery.transport import find, holds, refusals

logger = logging.getLogger(__name__)

#: Seconds between two heartbeats.
_BEAT = 1.0
#: Seconds between two readings while nothing is loaded: messages then wait for a reading.
_LOOK_AT_ZERO = 0.25
#: Share of a period after which the next round may begin, because rounds begin early or late.
_DUE = 0.9
#: Maximum readings of all records per second in the project; with more workers, each reads less.
_WORKERS_A_SECOND = 100
#: Seconds between two renewals of the lifetime of the project's keys.
_EXPIRY = 3600.0
#: Lifetime of a published estimate, in periods.
_ROUNDS = 5
#: Maximum age in seconds of a reading.
_STALE = 5.0
#: Seconds after which workers that start together have read each other's records.
_MEETING = 2.5
#: Time without a turn of the worker's loop after which its heartbeats stop: the minimum in seconds,
#: and the number of ttls.
_FROZEN, _FROZEN_TTLS = 60.0, 4
#: Shares of the ttl that Redis and RabbitMQ may take to answer. A broker that hangs may cost three
#: waits, and these must not delay the heartbeats for too long.
_REDIS_PART, _RABBITMQ_PART = 1 / 3, 1 / 6
_LONGEST_WAIT = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the autoscaler reads: queue lengths, and the records of other workers."""

    at: float
    #: Lengths by queue; ``None`` if the broker does not report them.
    lengths: Mapping[str, queue_lengths.Length] | None
    #: The other workers; ``None`` without a shared Redis.
    others: Sequence[worker_record.WorkerRecord] | None


class Membership(background_thread.BackgroundThread):
    """The exchange of one worker with the others.

    Args:
        app: the Celery app.
        hostname: node name of the worker.
        queues: the queues of each service.
        limited: the queues with published waits, each with its services and their slots per
            replica.
        ttl: seconds without a heartbeat after which a worker is lost.
        wake: makes the pool read ``counts.answers`` soon, in its own thread.
    """

    def __init__(
        self,
        app: Any,
        hostname: str,
        queues: Mapping[str, Sequence[str]],
        limited: Mapping[str, Mapping[str, int]],
        ttl: float,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            "gw-cluster", "this worker and the others cannot exchange records", period=_BEAT
        )
        #: The messages that this worker holds, and its name in Redis.
        self.holds = holds.Holds(f"{hostname}:{uuid.uuid4().hex[:16]}", ttl)
        self.queues = queues
        self.counts: poison_counts.Shared | None = None
        self.lost: lost_workers.LostWorkers | None = None
        wait = min(_LONGEST_WAIT, ttl * _REDIS_PART)
        #: Maximum seconds of a hanging round: one answer and one connection.
        self._longest_hang = 2 * wait
        self._longest_turn = max(_FROZEN, _FROZEN_TTLS * ttl)
        self._turned_at = math.inf
        self._wake_pool = wake
        self._beats: liveness.Beats | None = None
        self._shared = find.redis_of(app, wait)
        if self._shared is not None:
            self.counts = poison_counts.Shared(self, wake)
            self.lost = lost_workers.LostWorkers(app, self.holds.start, wait)
            self._beats = liveness.Beats(self._shared, self.holds, self.lost)
        self._declared: queue_lengths.DeclaredLengths | None = None
        with app.connection_for_read() as connection:
            if find.is_rabbitmq(connection):
                wait = min(_LONGEST_WAIT, ttl * _RABBITMQ_PART)
                self._declared = queue_lengths.DeclaredLengths(app, wait)
        #: The Redis lists of each queue, one per priority; read again on each connection.
        self._lists: dict[str, list[str]] | None = None
        #: Queues whose lengths are needed.
        self._followed = set(limited)
        self._loads = queue_time.Loads(limited)
        self._own_loads: dict[str, worker_record.QueueLoad] = {}
        self._size: worker_record.Size | None = None
        self._record = worker_record.WorkerRecord(worker=hostname)
        self._known: tuple[worker_record.WorkerRecord, ...] = ()
        self._lengths: Mapping[str, queue_lengths.Length] | None = None
        self._waits: dict[str, float | None] = {}
        self._reading: Reading | None = None
        self._on_read: Callable[[], None] | None = None
        self._meets_until = 0.0
        #: Keys of queues that are not lists, and names of records that cannot be read, as reported.
        self._broken: set[str] = set()
        self._unreadable: set[bytes] = set()
        #: Time of the first failed round since the last success.
        self._away_since: float | None = None
        self._next_look = self._next_beat = self._next_expiry = 0.0
        #: Time of the next reading of records; infinite while nothing needs them.
        self._next_records = 0.0 if limited else math.inf
        self._records_period = _BEAT

    @property
    def is_alone(self) -> bool:
        """Whether there is no Redis to share with other workers."""
        return self._shared is None

    @property
    def others(self) -> tuple[worker_record.WorkerRecord, ...]:
        """The other workers with recent heartbeats, as of the last round; empty without a Redis."""
        silent = self._beats.silent if self._beats is not None else ()
        return tuple(other for other in self._known if other.incarnation not in silent)

    @property
    def has_holds(self) -> bool:
        """Whether the broker is a Redis, on which messages are held beyond a connection."""
        return isinstance(self._shared, find.BrokerRedis)

    @property
    def early_start(self) -> str | None:
        """The id for the records of early acknowledged inputs; ``None`` if none can be written."""
        has_records = self.lost is not None and self.lost.early is not None
        return self.holds.start if has_records else None

    # -- in the thread of the worker's loop --

    def begin(self) -> None:
        if self._shared is None:
            logger.info(
                "this worker stands alone: workers exchange records through Redis, and neither the "
                "broker nor the result backend is one"
            )
        if self._shared is not None or self._followed:
            self.start()

    def follow(self, on_read: Callable[[], None]) -> None:
        """Read all queue lengths from now on, and call ``on_read`` in the thread each time."""
        self.read_others()
        queues = {queue for names in self.queues.values() for queue in names}
        self._followed = self._followed | queues  # a new set, because the thread may read the old
        self._lists = None
        self._meets_until = time.monotonic() + _MEETING
        self._next_look = 0.0
        self._on_read = on_read  # set last: a round in between must decide nothing
        self.start()
        self.wake()

    def read_others(self) -> None:
        self._next_records = 0.0

    def observe(self, worker: snapshot.Worker) -> None:
        """Update this worker's record, for the next round; once a second."""
        self._turned_at = time.monotonic()
        self._own_loads = self._loads.observe(worker)
        self.tell(worker, self._size)

    def expect_no_turn(self) -> None:
        """Note that the loop waits for the broker, and is not frozen, until ``observe``."""
        self._turned_at = math.inf

    def tell(
        self, worker: snapshot.Worker, size: worker_record.Size | None
    ) -> worker_record.WorkerRecord:
        """Update this worker's record, for the next round, and return it.

        Args:
            worker: the snapshot of this worker.
            size: the size that its autoscaler wants; ``None`` without one.
        """
        self._size = size
        self._record = worker_record.of(worker, self.queues, size, self._own_loads)
        return self._record

    def latest(self) -> Reading | None:
        """Return the last reading; ``None`` if it is too old, or there is none."""
        reading = self._reading
        if reading is None or time.monotonic() - reading.at > _STALE:
            return None
        return reading

    def at_zero(self, *, is_at_zero: bool) -> None:
        """Set whether nothing is loaded: readings are then more frequent."""
        was_at_zero = self.period == _LOOK_AT_ZERO
        self.period = _LOOK_AT_ZERO if is_at_zero else _BEAT
        if is_at_zero and not was_at_zero:
            self._next_look = 0.0
            self.wake()

    # -- in the thread --

    def run_round(self) -> None:
        now = time.monotonic()
        is_look = now >= self._next_look  # otherwise a call of ``wake`` began this round early
        if self._shared is not None and self._beats is not None:
            try:
                self._exchange(self._shared, self._beats, now, is_look=is_look)
            except BaseException as exc:
                if refusals.is_wrong_type(exc):
                    self._beats.remove_foreign(self._shared.client())
                self._shared.close()
                self._beats.script, self._lists = "", None
                self._away_since = self._away_since or now
                if self.counts is not None:
                    self.counts.fail()
                raise
            if self._away_since is not None:
                # The others lost Redis too, and their rounds may hang for as long.
                back = time.monotonic()
                hang = min(back - self._away_since, self._longest_hang)
                self._meets_until = back + _MEETING + hang
                self._away_since = None
        if not is_look:
            return
        self._next_look = now + _DUE * self.period
        if self._declared is not None and self._followed:
            self._lengths = self._declared.read(sorted(self._followed))
            if self._lengths is None:
                return
        # Without the records of the others, each worker would scale for the whole queue.
        if self._on_read is not None and (self._shared is None or now >= self._meets_until):
            others = None if self._shared is None else self.others
            self._reading = Reading(at=time.monotonic(), lengths=self._lengths, others=others)
            self._on_read()

    def leave(self) -> None:
        if self.lost is not None:
            self.lost.close()
        if self._declared is not None:
            self._declared.close()
        if self._shared is None or self._beats is None:
            return
        try:
            with self._shared.client().pipeline(transaction=False) as pipe:
                if self.counts is not None:
                    self.counts.ask_redis(pipe, self._shared.key("deaths", ""))
                pipe.execute(raise_on_error=False)
            self._beats.leave(self._shared.client())
        finally:
            self._shared.close()

    def _exchange(
        self, shared: find.SharedRedis, beats: liveness.Beats, now: float, *, is_look: bool
    ) -> None:
        if now - self._turned_at > self._longest_turn:
            raise TimeoutError(
                f"the worker's event loop has not turned for {now - self._turned_at:.0f} s"
            )
        client = shared.client()
        is_beat = now >= self._next_beat
        has_records = is_beat and now >= self._next_records
        if self._lists is None and isinstance(shared, find.BrokerRedis):
            self._lists = {queue: shared.lists(queue) for queue in sorted(self._followed)}
        lists = (self._lists or {}) if is_look else {}
        record = self._record.dumps()
        with client.pipeline(transaction=False) as pipe:
            if self.counts is not None:
                self.counts.ask_redis(pipe, shared.key("deaths", ""))
            for key in itertools.chain.from_iterable(lists.values()):
                pipe.llen(key)
            if is_beat:
                beats.ask(client, pipe, record)
            if has_records:
                pipe.hgetall(beats.records)
                pipe.zrange(beats.alive, 0, -1)
            self._write(pipe, shared)
            if now >= self._next_expiry:
                self._next_expiry = now + _EXPIRY
                pipe.expire(beats.records, liveness.FORGET)
            answers = iter(pipe.execute(raise_on_error=False))
        if self.counts is not None:
            self.counts.answer(answers)
        if lists:
            self._lengths = self._summed(lists, answers)
        if is_beat:
            self._next_beat = now + _DUE * _BEAT
            if not beats.follow(client, answers):
                self._next_beat = 0.0
                self.wake()
                self._wake_pool()
        if has_records:
            written, alive = _checked(answers), _checked(answers)
            if gone := written.keys() - set(alive):
                client.hdel(beats.records, *gone)
            self._follow_records(written, alive)
            self._next_records = now + _DUE * self._records_period

    def _summed(
        self, lists: Mapping[str, Sequence[str]], answers: Iterator[Any]
    ) -> dict[str, queue_lengths.Length]:
        """Return the length of each queue, without its keys that are not lists."""
        lengths, broken = {}, {}
        for queue, keys in lists.items():
            total = 0
            for key in keys:
                if isinstance(answer := next(answers), int):
                    total += answer
                elif refusals.is_wrong_type(answer):
                    broken[key] = queue
                else:
                    raise answer
            lengths[queue] = queue_lengths.Length(total)
        for key in broken.keys() - self._broken:
            logger.error(
                "the length of queue %s is unknown: the key %s in Redis is not a list. Delete or "
                "rename this key",
                *(broken[key], key),
            )
        self._broken = set(broken)
        return lengths

    # -- records --

    def _follow_records(self, written: Mapping[bytes, bytes], alive: Sequence[bytes]) -> None:
        # A worker that restarted under the same name is listed twice for one ttl: the entry with
        # the last heartbeat counts.
        newest, unreadable = {}, {}
        for name in alive:
            try:
                record = worker_record.loads(written[name], name.decode())
            except KeyError:
                continue  # a heartbeat without a record
            except (ValueError, TypeError, RecursionError) as exc:
                unreadable[name] = f"it is ignored: {exc}"
                continue
            newest[record.worker] = record
            if record.unreadable:
                unreadable[name] = f"these are ignored: {', '.join(record.unreadable)}"
        for name in unreadable.keys() - self._unreadable:
            logger.warning(
                "the record %s of another worker cannot be read, %.300s",
                *(name.decode(errors="replace"), unreadable[name]),
            )
        self._unreadable = set(unreadable)
        newest.pop(self._record.worker, None)
        self._known = tuple(newest.values())
        self._records_period = max(_BEAT, len(alive) / _WORKERS_A_SECOND)
        if self._declared is None or self._lengths is not None:
            self._waits = {queue: self._wait(queue) for queue in self._own_loads}

    # -- waits for callers --

    def _wait(self, queue: str) -> float | None:
        """Return the seconds that an input sent now would wait; ``None`` if unknown."""
        own = self._own_loads[queue]
        others = [record.loads[queue] for record in self.others if queue in record.loads]
        length = (self._lengths or {}).get(queue, queue_lengths.Length(0))
        return queue_time.estimate(length.messages * own.mean, [own, *others])

    def _write(self, pipe: Any, shared: find.SharedRedis) -> None:
        """Write the estimates, as one small value per queue that a caller can read."""
        lifetime = int(1000 * _ROUNDS * self._records_period)
        for queue, wait in self._waits.items():
            key = shared.key("wait", queue)
            if wait is None:
                pipe.delete(key)
            else:
                pipe.set(key, f"{wait:.3f}", px=lifetime)
        self._waits = {}


def _checked(answers: Iterator[Any]) -> Any:
    """Return the next answer of a pipeline; raise it if it is an exception."""
    if isinstance(answer := next(answers), Exception):
        raise answer
    return answer
