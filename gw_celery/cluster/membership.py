"""One worker among those of its project: one thread, and one exchange with Redis in a round.

A worker beats, writes its record, reads those of the others, and asks how long the queues are. What
it makes of the records is decided elsewhere, by functions of them: ``policy.demand``,
``policy.speed_bands``, ``policy.queue_time``.
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

from celery.backends.redis import RedisBackend

from gw_celery import background_thread
from gw_celery.cluster import early_acks, liveness, poison_counts, queue_lengths
from gw_celery.policy import queue_time
from gw_celery.protocol import snapshot, worker_record
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: Seconds between two beats, whatever else is done.
_BEAT = 1.0
#: While nothing is loaded a message waits for the next look.
_LOOK_AT_ZERO = 0.25
#: Part of a period after which its round may begin: a round is never exactly on time.
_DUE = 0.9
#: Records that are read once a second in the whole project: more workers read more rarely.
_WORKERS_A_SECOND = 100
#: Seconds after which a project's keys are given another week.
_EXPIRY = 3600.0
#: Periods that an estimate of a wait holds good.
_ROUNDS = 5
#: Seconds after which what was read says nothing about now.
_STALE = 5.0
#: Workers that come together know of one another by then.
_MEETING = 2.5
#: Where no worker is ever declared lost, others are counted by this.
_TTL = 15.0
#: Parts of the ttl that Redis, and RabbitMQ, have for an answer. A broker that hangs costs up to
#: three of its waits, and must not keep this worker from beating.
_REDIS_PART, _RABBITMQ_PART = 1 / 3, 1 / 6
_LONGEST_WAIT = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the autoscaler goes by."""

    at: float
    #: By queue; ``None`` where the broker does not tell.
    lengths: Mapping[str, queue_lengths.Length] | None
    #: The other workers; ``None`` without a Redis to know them from.
    others: Sequence[worker_record.WorkerRecord] | None


class Membership(background_thread.BackgroundThread):
    """What one worker tells the others, and learns of them.

    Args:
        app: the Celery app.
        hostname: the worker's node name.
        queues: of each service that it serves.
        limited: of each queue whose callers are told how long an input would wait, its services
            with their slots in one replica.
        ttl: seconds without a beat after which a worker is lost; ``None`` declares none lost.
        wake: has the pool look at ``counts.answers`` soon, in its own thread.
    """

    def __init__(
        self,
        app: Any,
        hostname: str,
        queues: Mapping[str, Sequence[str]],
        limited: Mapping[str, Mapping[str, int]],
        ttl: float | None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            "gw-cluster", "this worker and the others cannot exchange records", period=_BEAT
        )
        #: This start of the worker; what it acknowledged early is kept by it.
        self.start_id = f"{hostname}:{uuid.uuid4().hex[:16]}"
        self.queues = queues
        self.counts: poison_counts.Shared | None = None
        self.lost: early_acks.LostInputs | None = None
        # Backends derived from Redis (Sentinel) write results without the pipelines that the
        # records of early inputs need.
        if ttl is not None and type(app.backend) is RedisBackend:
            self.lost = early_acks.LostInputs(app, self.start_id)
        may_declare, ttl = ttl is not None, ttl or _TTL
        wait = min(_LONGEST_WAIT, ttl * _REDIS_PART)
        #: An answer that does not come, and a connection that does not.
        self._longest_hang = 2 * wait
        self._beats: liveness.Beats | None = None
        self._shared = find.redis_of(app, wait)
        if self._shared is not None:
            self.counts = poison_counts.Shared(self, wake)
            self._beats = liveness.Beats(
                self._shared, self.start_id, ttl, self.lost, may_declare=may_declare
            )
        self._declared: queue_lengths.DeclaredLengths | None = None
        with app.connection_for_read() as connection:
            if find.is_rabbitmq(connection):
                wait = min(_LONGEST_WAIT, ttl * _RABBITMQ_PART)
                self._declared = queue_lengths.DeclaredLengths(app, wait)
        #: The lists of each queue in Redis, one for each priority; found anew on each connection.
        self._lists: dict[str, list[str]] | None = None
        #: Queues whose lengths are used.
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
        #: The first round that failed, while none has succeeded since.
        self._away_since: float | None = None
        self._next_look = self._next_beat = self._next_expiry = 0.0
        #: Of records, which are read where something depends on them.
        self._next_records = 0.0 if limited else math.inf
        self._records_period = _BEAT

    @property
    def is_alone(self) -> bool:
        """Whether there is no Redis to know other workers from."""
        return self._shared is None

    @property
    def others(self) -> tuple[worker_record.WorkerRecord, ...]:
        """The other workers, as of the last round, but for those that are silent, declared or not.

        Empty without a Redis.
        """
        silent = self._beats.silent if self._beats is not None else ()
        return tuple(other for other in self._known if other.incarnation not in silent)

    # -- in the thread of the worker's loop --

    def begin(self) -> None:
        """Start the thread, where there is something for it to do."""
        if self._shared is None:
            logger.info(
                "this worker stands alone: workers exchange records through Redis, and neither the "
                "broker nor the result backend is one"
            )
        if self._shared is not None or self._followed:
            self.start()

    def follow(self, on_read: Callable[[], None]) -> None:
        """Read the lengths of all queues from now on; ``on_read`` is called in the thread."""
        self.read_others()
        queues = {queue for names in self.queues.values() for queue in names}
        self._followed = self._followed | queues  # the thread may run, and go through the old set
        self._lists = None
        self._meets_until = time.monotonic() + _MEETING
        self._next_look = 0.0
        self._on_read = on_read  # last: a round in between decides nothing
        self.start()
        self.wake()

    def read_others(self) -> None:
        """Read the records of the others from now on."""
        self._next_records = 0.0

    def observe(self, worker: snapshot.Worker) -> None:
        """Have the others know this worker as it is, from the next round on; once a second."""
        self._own_loads = self._loads.observe(worker)
        self.tell(worker, self._size)

    def tell(
        self, worker: snapshot.Worker, size: worker_record.Size | None
    ) -> worker_record.WorkerRecord:
        """Have the others know this worker as it is, and return the record.

        Args:
            size: as its autoscaler has it; ``None`` without one.
        """
        self._size = size
        self._record = worker_record.of(worker, self.queues, size, self._own_loads)
        return self._record

    def latest(self) -> Reading | None:
        """Return what was read last; ``None`` when that is too long ago, or never was."""
        reading = self._reading
        if reading is None or time.monotonic() - reading.at > _STALE:
            return None
        return reading

    def at_zero(self, *, is_at_zero: bool) -> None:
        """Say whether nothing is loaded: a message waits for the next look then, which is soon."""
        was_at_zero = self.period == _LOOK_AT_ZERO
        self.period = _LOOK_AT_ZERO if is_at_zero else _BEAT
        if is_at_zero and not was_at_zero:
            self._next_look = 0.0
            self.wake()

    # -- in the thread --

    def run_round(self) -> None:
        now = time.monotonic()
        is_look = now >= self._next_look  # else there are only orders
        if self._shared is not None and self._beats is not None:
            try:
                self._exchange(self._shared, self._beats, now, is_look=is_look)
            except BaseException:
                self._shared.close()
                self._beats.script, self._lists = "", None
                self._away_since = self._away_since or now
                if self.counts is not None:
                    self.counts.fail()
                raise
            if self._away_since is not None:
                # The others have been away as well, and may hang in their waits for as long again.
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
        # Before the others are known each would scale for the whole queue.
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
                self._beats.leave(pipe)
                pipe.execute(raise_on_error=False)
        finally:
            self._shared.close()

    def _exchange(
        self, shared: find.SharedRedis, beats: liveness.Beats, now: float, *, is_look: bool
    ) -> None:
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
                for key in (beats.records, beats.alive):
                    pipe.expire(key, liveness.FORGET)
            answers = iter(pipe.execute(raise_on_error=False))
        if self.counts is not None:
            self.counts.answer(answers)
        if lists:
            self._lengths = {
                queue: queue_lengths.Length(sum(int(_checked(answers)) for _ in keys))
                for queue, keys in lists.items()
            }
        if is_beat:
            self._next_beat = now + _DUE * _BEAT
            if not beats.follow(client, answers, record):
                self._next_beat = 0.0
                self.wake()
        if has_records:
            written, alive = _checked(answers), _checked(answers)
            if gone := written.keys() - set(alive):
                client.hdel(beats.records, *gone)
            self._follow_records(written, alive)
            self._next_records = now + _DUE * self._records_period

    # -- records --

    def _follow_records(self, written: Mapping[bytes, bytes], alive: Sequence[bytes]) -> None:
        # A worker that was started again under its name is in its own way for a ttl: the one that
        # beat last counts.
        newest = {}
        for name in alive:
            try:
                record = worker_record.loads(written[name], name.decode())
                newest[record.worker] = record
            except KeyError:
                continue  # it has only beaten
            except (ValueError, TypeError, RecursionError) as exc:
                logger.debug("the record of %r cannot be read: %s", name, exc)
        newest.pop(self._record.worker, None)
        self._known = tuple(newest.values())
        self._records_period = max(_BEAT, len(alive) / _WORKERS_A_SECOND)
        if self._declared is None or self._lengths is not None:
            self._waits = {queue: self._wait(queue) for queue in self._own_loads}

    # -- what callers are told --

    def _wait(self, queue: str) -> float | None:
        """Return the seconds that an input which comes now would wait; ``None``: unknown."""
        own = self._own_loads[queue]
        others = [record.loads[queue] for record in self.others if queue in record.loads]
        length = (self._lengths or {}).get(queue, queue_lengths.Length(0))
        return queue_time.estimate(length.messages * own.mean, [own, *others])

    def _write(self, pipe: Any, shared: find.SharedRedis) -> None:
        """Write the estimates that the last records gave; a caller reads one small value."""
        lifetime = int(1000 * _ROUNDS * self._records_period)
        for queue, wait in self._waits.items():
            key = shared.key("wait", queue)
            if wait is None:
                pipe.delete(key)
            else:
                pipe.set(key, f"{wait:.3f}", px=lifetime)
        self._waits = {}


def _checked(answers: Iterator[Any]) -> Any:
    """Return the next answer of a pipeline; an error among them is raised."""
    if isinstance(answer := next(answers), Exception):
        raise answer
    return answer
