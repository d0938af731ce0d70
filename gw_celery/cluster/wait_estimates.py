"""Tells callers how long an input would wait in the queues of services with a ``max_queue_time``.

Each worker writes what it has and does of a queue, reads what the others do, and writes what comes
of it: a caller reads one small value. One thread does it, once a second; the worker's loop waits
for nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from gw_celery.cluster import queue_lengths, redis
from gw_celery.policy import queue_time
from gw_celery.pool import request
from gw_celery.protocol import snapshot
from gw_celery.worker import serving

logger = logging.getLogger(__name__)

#: Seconds that Redis has to answer, and the end of a worker waits for the thread.
_PATIENCE = 1.0
#: Rounds that an estimate, or what a worker told of itself, is believed.
_ROUNDS = 5
#: Workers that may write once a second; more of them take longer turns.
_AT_EASE = 100


class Broker(Protocol):
    """What tells how many messages wait; only the thread asks it."""

    def read(self) -> Mapping[str, queue_lengths.Length] | None:
        """By queue; ``None`` where the transport does not tell."""

    def close(self) -> None: ...


class Estimates:
    """Publishes the waits of some queues.

    Args:
        where: the Redis that callers read.
        broker: where the queues are.
        worker: the worker's node name.
        queues: the services of each queue, and the slots that a replica has for each.
        pool: whose work it is.
    """

    def __init__(
        self,
        where: redis.Board,
        broker: Broker,
        worker: str,
        queues: Mapping[str, Mapping[str, int]],
        pool: snapshot.Source,
    ) -> None:
        self._board = where
        self._broker = broker
        self._worker = worker
        self._queues = queues
        self._pool = pool
        self._paces = {key: queue_time.Pace() for slots in queues.values() for key in slots}
        self._parts = {key: queue_time.Part() for slots in queues.values() for key in slots}
        self._told = {queue: queue_time.Told(_ROUNDS) for queue in queues}
        self._interval = 1.0
        self._turn = 0
        self._is_away = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gw-estimates", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; the others do not count on this worker any more."""
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join(2 * _PATIENCE)

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._try(self.publish)
            self._is_over.wait(self._interval)
        self._try(self._leave)
        self._board.close()
        self._broker.close()

    def _try(self, what: Callable[[], None]) -> None:
        try:
            what()
            self._is_away = False
        except Exception as exc:
            if not self._is_away:  # once for an outage
                logger.warning(
                    "callers are not told how long an input would wait: %r; tried again every "
                    "%.0f s",
                    exc,
                    self._interval,
                )
            self._is_away = True

    def publish(self) -> None:
        """Write one estimate for each queue."""
        queued = self._broker.read() or {}
        worker = self._pool.snapshot()
        tallies, rates = worker.tallies, self._rates(worker)
        self._turn += 1
        pipe = self._board.client.pipeline(transaction=False)
        for queue, slots in self._queues.items():
            load = self._load(slots, tallies, rates)
            key = self._board.key("load", queue)
            pipe.hset(key, self._worker, queue_time.write(load, self._turn))
            pipe.pexpire(key, int(20_000 * _ROUNDS * self._interval))
            pipe.hgetall(key)
        self._conclude(pipe.execute()[2::3], tallies, queued)

    def _load(
        self,
        services: Iterable[str],
        tallies: Mapping[str, snapshot.Counters],
        rates: Mapping[str, float | None],
    ) -> queue_time.Load:
        found = {key: tallies[key] for key in services if key in tallies}
        return queue_time.Load(
            waiting=sum(one.waiting for one in found.values()),
            rate=queue_time.shared(
                {key: rates[key] for key in services},
                {key: self._parts[key].observe(one.arrived) for key, one in found.items()},
            ),
        )

    def _rates(self, worker: snapshot.Worker) -> dict[str, float | None]:
        """What the READY replicas do in a second: by their score, else by what slots have done."""
        rates: dict[str, float | None] = {}
        for slots in self._queues.values():
            for key, per_replica in slots.items():
                counters = worker.tallies.get(key, snapshot.Counters())
                score = worker.scores.get(key, snapshot.Score()).value
                pace = self._paces[key].observe(counters.served, counters.busy)
                if score is not None:
                    pace = score / per_replica
                rates[key] = None if pace is None else pace * worker.ready_slots.get(key, 0)
        return rates

    def _conclude(
        self,
        answers: Sequence[Mapping[str, str]],
        tallies: Mapping[str, snapshot.Counters],
        queued: Mapping[str, queue_lengths.Length],
    ) -> None:
        now, most = request.now(), 0
        pipe = self._board.client.pipeline(transaction=False)
        for (queue, services), told in zip(self._queues.items(), answers, strict=True):
            heard = self._told[queue]
            loads, most = heard.hear(told, now), max(most, len(told))
            found = [tallies[key] for key in services if key in tallies]
            total = queue_time.together(loads)
            messages = queued[queue].messages if queue in queued else 0
            ahead = messages * snapshot.mean_workload(found)
            wait = queue_time.estimate(ahead, total.waiting, total.rate)
            key = self._board.key("wait", queue)
            if wait is None:
                pipe.delete(key)
            else:
                pipe.set(key, f"{wait:.3f}", px=int(1000 * _ROUNDS * self._interval))
            if silent := heard.silent(now):
                pipe.hdel(self._board.key("load", queue), *silent)
        pipe.execute()
        self._interval = max(1.0, most / _AT_EASE)
        for heard in self._told.values():
            heard.lifetime = _ROUNDS * self._interval

    def _leave(self) -> None:
        pipe = self._board.client.pipeline(transaction=False)
        for queue in self._queues:
            pipe.hdel(self._board.key("load", queue), self._worker)
        pipe.execute()


def of(app: Any, plan: serving.Plan, worker: str, pool: snapshot.Source) -> Estimates | None:
    """Return what publishes for a worker; ``None`` where nothing is limited, or nobody could read.

    Nothing connects.
    """
    limited = {one.queue for one in plan.served if one.key in plan.queue_times}
    if not limited or (where := redis.of(app, _PATIENCE)) is None:
        return None
    queues = {
        queue: {one.key: one.max_inputs for one in plan.served if one.queue == queue}
        for queue in sorted(limited)
    }
    broker = queue_lengths.Reader(app, {queue: [queue] for queue in queues})
    return Estimates(where, broker, worker, queues, pool)
