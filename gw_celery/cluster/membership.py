"""One worker among those of its project: one thread, and one exchange with Redis in a round.

A worker beats, writes its record, reads those of the others, and asks how long the queues are. What
it makes of the records is decided elsewhere, by functions of them: ``policy.demand``,
``policy.speed_bands``, ``policy.queue_time``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gw_celery import background_thread
from gw_celery.cluster import early_acks, liveness, lost_inputs, poison_counts, queue_lengths
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
            "gw-cluster", "the other workers cannot be known, nor know of this one", period=_BEAT
        )
        #: This start of the worker; what it acknowledged early is kept by it.
        self.start_id = f"{hostname}:{uuid.uuid4().hex[:16]}"
        self.queues = queues
        #: The other workers, as of the last round; empty without a Redis.
        self.others: tuple[worker_record.WorkerRecord, ...] = ()
        self.counts: poison_counts.Shared | None = None
        self.lost = None if ttl is None else lost_inputs.of(app, self.start_id)
        self._app = app
        self._may_declare = ttl is not None
        self._ttl = _TTL if ttl is None else ttl
        self._life = 0
        self._trust = liveness.Trust(self._ttl)
        wait = min(_LONGEST_WAIT, self._ttl * _REDIS_PART)
        #: An answer that does not come, and a connection that does not.
        self._longest_hang = 2 * wait
        self._shared = find.redis_of(app, wait)
        if self._shared is not None:
            self.counts = poison_counts.Shared(self, wake)
            #: Sorted set: incarnations by the times of their last beats.
            self._alive = self._shared.key("alive")
            #: Hash: the record of each incarnation.
            self._records = self._shared.key("records")
        self._declared = _declared_lengths(app, min(_LONGEST_WAIT, self._ttl * _RABBITMQ_PART))
        self._lists: queue_lengths.RedisLengths | None = None
        #: By which Redis knows the script of a beat, on this connection.
        self._script = ""
        self._has_scripts = True
        #: Queues whose lengths are used.
        self._followed = set(limited)
        self._loads = queue_time.Loads(limited)
        self._own_loads: dict[str, worker_record.QueueLoad] = {}
        self._names = {service: ",".join(sorted(names)) for service, names in queues.items()}
        self._size: worker_record.Size | None = None
        self._record = worker_record.WorkerRecord(worker=hostname)
        self._known: tuple[worker_record.WorkerRecord, ...] = ()
        #: Those that have not beaten for a ttl, and their last beats.
        self._silent: dict[str, bytes] = {}
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
    def incarnation(self) -> str:
        """This worker's name in Redis: another one after it was declared lost."""
        return f"{self.start_id}.{self._life}"

    # -- in the thread of the worker's loop --

    def begin(self) -> None:
        """Start the thread, where there is something for it to do."""
        if self._shared is None:
            logger.info(
                "neither the broker nor the result backend is a Redis: this worker stands alone, "
                "and knows no other"
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
        self._record = worker_record.of(worker, self._names, size, self._own_loads)
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
        if self._shared is not None:
            try:
                self._exchange(self._shared, now, is_look=is_look)
            except BaseException:
                self._shared.close()
                self._lists, self._script = None, ""
                if self._away_since is None:
                    self._away_since = now
                if self.counts is not None:
                    self.counts.fail()
                raise
            self._meet_again()
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

    def _meet_again(self) -> None:
        """The others have been away as well, and may hang in their waits for as long again."""
        if self._away_since is not None:
            now = time.monotonic()
            self._meets_until = now + _MEETING + min(now - self._away_since, self._longest_hang)
            self._away_since = None

    def leave(self) -> None:
        if self.lost is not None:
            self.lost.close()
        if self._declared is not None:
            self._declared.close()
        if self._shared is not None:
            try:
                self._withdraw(self._shared)
            finally:
                self._shared.close()

    def _withdraw(self, shared: find.SharedRedis) -> None:
        """The others do not count on this worker any more."""
        with shared.client().pipeline(transaction=False) as pipe:
            if self.counts is not None:
                self.counts.ask_redis(pipe, shared.key("deaths", ""))
            pipe.hdel(self._records, self.incarnation)
            if self.lost is None or not self.lost.has_own():
                pipe.zrem(self._alive, self.incarnation)
            pipe.execute(raise_on_error=False)

    def _exchange(self, shared: find.SharedRedis, now: float, *, is_look: bool) -> None:
        client = shared.client()
        if self._has_scripts and not self._script:
            self._load_script(client)
        lists = self._lists_of(shared) if is_look else None
        is_beat = now >= self._next_beat
        has_records = is_beat and now >= self._next_records
        own = liveness.now()
        with client.pipeline(transaction=False) as pipe:
            if self.counts is not None:
                self.counts.ask_redis(pipe, shared.key("deaths", ""))
            if lists is not None:
                lists.ask(pipe)
            if is_beat and self._has_scripts:
                self._ask_beat(pipe)
            if has_records:
                self._ask_records(pipe)
            self._write(pipe, shared, now)
            answers = iter(pipe.execute(raise_on_error=False))
        if self.counts is not None:
            self.counts.answer(answers)
        if lists is not None:
            self._lengths = lists.read(_checked(answers))
        if is_beat:
            self._next_beat = now + _DUE * _BEAT
            self._follow_beat(client, own, self._answer_to_beat(client, answers))
        if has_records:
            checked = _checked(answers)
            self._follow_records(client, next(checked), next(checked))
            self._next_records = now + _DUE * self._records_period

    def _lists_of(self, shared: find.SharedRedis) -> queue_lengths.RedisLengths | None:
        if self._lists is None and isinstance(shared, find.BrokerRedis) and self._followed:
            self._lists = queue_lengths.RedisLengths(shared, self._followed)
        return self._lists

    # -- beats --

    def _keys(self, incarnation: str) -> tuple[str, str, str]:
        """The keys of the scripts of ``liveness``; the second is the tombstone."""
        assert self._shared is not None
        return (self._alive, self._shared.key("dead", incarnation), self._records)

    def _ask_beat(self, pipe: Any) -> None:
        keys = self._keys(self.incarnation)
        record = self._record.dumps()
        pipe.evalsha(self._script, len(keys), *keys, self.incarnation, self._ttl, record)

    def _load_script(self, client: Any) -> None:
        try:
            self._script = client.script_load(liveness.BEAT)
        except Exception as exc:
            if not liveness.is_refusal(exc):
                raise
            self._do_without_scripts(exc)

    def _answer_to_beat(self, client: Any, answers: Iterator[Any]) -> list[Any]:
        if self._has_scripts:
            answer: Any = next(answers)
            if not isinstance(answer, Exception):
                return list(answer)
            if not liveness.is_refusal(answer):
                raise answer
            self._do_without_scripts(answer)
        keys = self._keys(self.incarnation)
        return liveness.beat(client, keys, self.incarnation, self._ttl, self._record.dumps())

    def _do_without_scripts(self, exc: Exception) -> None:
        self._has_scripts = self._may_declare = False
        logger.warning(
            "the shared Redis refuses scripts (%s): until it is started again this worker declares"
            " no other lost",
            exc,
        )

    def _follow_beat(self, client: Any, own: float, answer: list[Any]) -> None:
        if answer[0] == b"dead":
            self._begin_anew(answer[1].decode())
            return
        server, old, ahead = answer
        is_trusted = self._trust.beat(own, float(server))
        listed = [*old, *ahead]
        self._silent = dict(zip(map(bytes.decode, listed[::2]), listed[1::2], strict=True))
        self._tell_apart()
        # First, so that none is begun with again.
        while self.lost is not None and self.lost.answered:
            answered = self.lost.answered.popleft()
            client.zrem(self._alive, answered)
            self._silent.pop(answered, None)
        if is_trusted and self._may_declare:
            for incarnation, beat in self._silent.items():
                is_late = abs(float(server) - float(beat)) > 2 * self._ttl
                self._declare(client, incarnation, beat, is_late=is_late)

    def _tell_apart(self) -> None:
        """Those that are silent are counted no more, declared or not."""
        self.others = tuple(other for other in self._known if other.incarnation not in self._silent)

    def _begin_anew(self, declarer: str) -> None:
        self._life += 1
        self._trust = liveness.Trust(self._ttl)
        self._next_beat = 0.0
        self.wake()
        logger.error(
            "%s has declared this worker lost, because it was frozen or could not reach Redis for "
            "over %.0f s: what it had acknowledged early was answered as failed; it goes on as %s",
            declarer,
            self._ttl,
            self.incarnation,
        )

    def _declare(self, client: Any, incarnation: str, beat: bytes, *, is_late: bool) -> None:
        """Declare a worker lost, at most once; answer for it, or where its declarer has not."""
        keys = self._keys(incarnation)
        result = client.eval(
            liveness.DECLARE,
            len(keys),
            *keys,
            incarnation,
            beat,
            self.incarnation,
            liveness.TOMBSTONE,
        )
        if result == liveness.DECLARED:
            logger.warning(
                "worker %s is lost: it has not been seen for %.0f s", incarnation, self._ttl
            )
            self._on_lost(client, incarnation)
        elif result == liveness.WAS_DECLARED and is_late:
            if self._goes_on(client, incarnation):
                client.zrem(self._alive, incarnation)
            else:
                self._on_lost(client, incarnation)

    def _goes_on(self, client: Any, incarnation: str) -> bool:
        """Whether a worker that was declared lost woke up: what is on record it runs now."""
        beating = {name.decode() for name in client.zrange(self._alive, 0, -1)} - set(self._silent)
        return early_acks.start_of(incarnation) in map(early_acks.start_of, beating)

    def _on_lost(self, client: Any, incarnation: str) -> None:
        """Do what is due for a worker that was declared lost: later its messages are given back.

        It stays among those that beat until that is done: should this worker be lost meanwhile,
        another one does it.
        """
        if self.lost is not None:
            self.lost.take(incarnation)
        else:
            client.zrem(self._alive, incarnation)

    # -- records --

    def _ask_records(self, pipe: Any) -> None:
        pipe.hgetall(self._records)
        pipe.zrange(self._alive, 0, -1)

    def _follow_records(
        self, client: Any, written: Mapping[bytes, bytes], alive: Sequence[bytes]
    ) -> None:
        # A worker that was started again under its name is in its own way for a ttl: the one that
        # beat last counts.
        newest = {}
        for name in alive:
            if name in written and (record := _read(name, written[name])) is not None:
                newest[record.worker] = record
        newest.pop(self._record.worker, None)
        self._known = tuple(newest.values())
        self._tell_apart()
        self._records_period = max(_BEAT, len(alive) / _WORKERS_A_SECOND)
        if self._declared is None or self._lengths is not None:
            self._waits = {queue: self._wait(queue) for queue in self._own_loads}
        if gone := written.keys() - set(alive):
            client.hdel(self._records, *gone)

    # -- what callers are told --

    def _wait(self, queue: str) -> float | None:
        """Return the seconds that an input which comes now would wait; ``None``: unknown."""
        own = self._own_loads[queue]
        others = [record.loads[queue] for record in self.others if queue in record.loads]
        total = queue_time.together([own, *others])
        length = (self._lengths or {}).get(queue, queue_lengths.Length(0))
        return queue_time.estimate(length.messages * own.mean, total.waiting, total.rate)

    def _write(self, pipe: Any, shared: find.SharedRedis, now: float) -> None:
        """Write the estimates that the last records gave; a caller reads one small value."""
        lifetime = int(1000 * _ROUNDS * self._records_period)
        for queue, wait in self._waits.items():
            key = shared.key("wait", queue)
            if wait is None:
                pipe.delete(key)
            else:
                pipe.set(key, f"{wait:.3f}", px=lifetime)
        self._waits = {}
        if now >= self._next_expiry:
            self._next_expiry = now + _EXPIRY
            for key in (self._records, self._alive):
                pipe.expire(key, liveness.FORGET)


def _read(name: bytes, written: bytes) -> worker_record.WorkerRecord | None:
    try:
        return worker_record.loads(written, name.decode())
    except (ValueError, TypeError, RecursionError) as exc:
        logger.debug("the record of %r cannot be read: %s", name, exc)
        return None


def _checked(answers: Iterator[Any]) -> Iterator[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        yield answer


def _declared_lengths(app: Any, timeout: float) -> queue_lengths.DeclaredLengths | None:
    with app.connection_for_read() as connection:
        if find.is_rabbitmq(connection):
            return queue_lengths.DeclaredLengths(app, timeout)
    return None
