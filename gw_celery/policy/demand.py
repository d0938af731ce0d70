"""The replicas that a service needs, and this worker's share of them; pure, in the worker's parent.

Workers that serve the same services are a group. Each computes the need of the whole group from the
same records, and takes its part. Groups that share work divide it by their capacity.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import statistics
from collections.abc import Iterable, Sequence

from gw_celery.policy import scaling
from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import Size, WorkerRecord

#: Weight of the newest start-up in the moving average.
_NEWEST = 0.5
_LOADING = frozenset({"starting", "entering", "probing", "benchmarking"})


class Service:
    """One service, as this worker's group sees it.

    Args:
        key: key of the service.
        target: inputs per replica that the autoscaler aims at.
        rules: the operator's settings.
        now: the current time.
    """

    def __init__(self, key: str, target: int, rules: scaling.Rules, now: float) -> None:
        self._key = key
        self._target = target
        self._rules = rules
        self._meter = scaling.Meter(rules, now)
        self._taken: dict[str, float] = {}
        self._queued: int | None = None

    def observe(
        self,
        now: float,
        mine: WorkerRecord,
        others: Sequence[WorkerRecord] | None,
        *,
        queued: int | None = None,
        consumers: int | None = None,
    ) -> snapshot.ServiceDemand:
        """Return the demand at the time ``now``; called once a second.

        Args:
            now: the current time.
            mine: the record of this worker.
            others: the other workers that serve it; ``None`` if they are unknown.
            queued: messages in the broker; ``None`` if it does not report them.
            consumers: number of consuming workers, if only their number is known.
        """
        workers = [mine, *(others or ())]
        parts = [worker.services[self._key] for worker in workers]
        # Inputs inside other workers are known only with their records; the queue is always known.
        inside = share = _part(mine, workers)
        if others is None:
            share = 1.0 / max(1, consumers or 1)
        # Mean workload of an input over all workers, weighted by what each has taken.
        mean = statistics.fmean([part.mean for part in parts], [part.taken + 1.0 for part in parts])
        before, self._queued = self._queued, queued
        grown = 0 if before is None or queued is None else queued - before
        came = inside * self._came(workers) + share * mean * grown
        self._meter.add(now, came)
        waits = inside * sum(part.waiting for part in parts) + share * mean * (queued or 0)
        inputs = inside * sum(part.waiting_inputs for part in parts) + share * (queued or 0)
        running = inside * sum(part.running_inputs for part in parts)
        score = _score(workers, self._key)
        filled = (inputs + running) / self._target
        if score is None:
            # Without a score, plan for enough replicas to hold all inputs.
            need = keep = filled
        else:
            fillable = inputs / self._target
            need = scaling.need(self._meter.rate, waits, score, self._rules, fillable)
            keep = scaling.kept(self._meter.pace, score, self._rules)
        if queued is None and filled >= (replicas := _size(mine).replicas) > 0:
            # The pool takes no more inputs than it has slots, so that the rest is unknown.
            need = max(need, replicas + 1.0)
        return snapshot.ServiceDemand(
            queued=queued,
            share=share,
            rate=self._meter.rate,
            waiting=waits,
            running_inputs=running,
            score=score,
            need=need,
            keep=keep,
            is_active=came > 0 or inputs > 0 or running > 0,
        )

    def _came(self, workers: Sequence[WorkerRecord]) -> float:
        """Return the workload taken since the last call, by workers that existed then."""
        before = self._taken
        self._taken = {worker.incarnation: worker.services[self._key].taken for worker in workers}
        return sum(taken - before[name] for name, taken in self._taken.items() if name in before)


def size_of(worker: snapshot.Worker, least: int, most: int) -> Size:
    """Return the size of a worker, for its record.

    Args:
        worker: its snapshot.
        least: replicas that it keeps at any load.
        most: maximum replicas.
    """
    replicas = worker.replicas
    missing = sum(replica.state == "failed" and replica.restarts > 0 for replica in replicas)
    held = sum(replica.state == "stopped" for replica in replicas)
    # If an operator has drained the whole worker, others must do its work.
    missing += most if held and held == len(replicas) else held
    return Size(
        least=least,
        capacity=max(0, most - missing),
        replicas=max(len(replicas), worker.desired),
    )


def sharing(
    mine: WorkerRecord, others: Sequence[WorkerRecord] | None, key: str
) -> list[WorkerRecord] | None:
    """Return the other workers that follow the load and consume the same queues of a service."""
    if others is None:
        return None
    queues = mine.services[key].queues
    return [
        other
        for other in others
        if other.size is not None
        and (service := other.services.get(key)) is not None
        and service.queues == queues
    ]


def group_of(mine: WorkerRecord, others: Sequence[WorkerRecord] | None) -> list[WorkerRecord]:
    """Return the workers that serve the same services as this one, which comes first."""
    first = next(iter(mine.services))
    alike = sharing(mine, others, first) or []
    return [mine, *(other for other in alike if other.serves == mine.serves)]


def part(group: Sequence[WorkerRecord], total: int) -> int:
    """Return the part of ``total`` replicas of a group that belongs to its first worker.

    Scores weigh the parts if they differ clearly; small differences must not move a replica.
    """
    first = next(iter(group[0].services))
    scores = [worker.services[first].score for worker in group]
    known = [score for score in scores if score]
    slowest = min(known) if len(known) == len(group) else None
    peers = tuple(
        Peer(
            worker.worker,
            _size(worker).capacity,
            _size(worker).least,
            1.0 if slowest is None or not score else float(round(2 * score / slowest)) / 2,
        )
        for worker, score in zip(group, scores, strict=True)
    )
    return bisect.bisect_right(_own_positions(peers, group[0].worker), total)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A worker of a group, for the division of replicas."""

    #: Node name, which decides between workers of equal value.
    name: str
    #: Replicas that it could have now, without those that fail to start.
    capacity: int
    #: Replicas that it has in any case.
    least: int = 0
    #: Weight of each replica, above 0: the worker's score if scores differ, else 1.0.
    score: float = 1.0


# Each worker asks in turn for its present capacity and for its full capacity.
@functools.lru_cache(maxsize=4)
def _own_positions(peers: tuple[Peer, ...], me: str) -> list[int]:
    return [position for position, name in enumerate(order(peers), start=1) if name == me]


def order(peers: Iterable[Peer]) -> list[str]:
    """Return the worker of each replica: first all minimums, then by value.

    The k-th replica of a worker has the value ``(k - 1/2) / (capacity * score)``; lower values come
    first. Workers with the same records thus agree without communication. One more replica never
    moves another, so that growth by one starts only one.

    Source: Webster's method of apportionment (Sainte-Laguë).
    """
    known = sorted(peers, key=lambda peer: peer.name)
    least = [peer.name for peer in known for _ in range(min(peer.least, peer.capacity))]
    by_value = sorted(
        ((taken + 0.5) / (peer.capacity * peer.score), peer.name)
        for peer in known
        for taken in range(min(peer.least, peer.capacity), peer.capacity)
    )
    return [*least, *(name for _, name in by_value)]


class StartUp:
    """The mean duration of a start-up, from the start of a child until it is READY."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        #: Whether a child is loading, so that the worker is not idle.
        self.is_loading = False
        self._pids: set[int] = set()

    def observe(self, replicas: Iterable[snapshot.Replica]) -> None:
        """Update the mean; each child counts once, after its first READY."""
        start_ups: dict[int, float] = {}
        self.is_loading = False
        for replica in replicas:
            if replica.pid is not None and replica.start_up is not None:
                start_ups[replica.pid] = replica.start_up
            elif replica.state in _LOADING:
                self.is_loading = True
        for pid in start_ups.keys() - self._pids:
            mean, seconds = self.seconds, start_ups[pid]
            self.seconds = seconds if mean is None else mean + _NEWEST * (seconds - mean)
        self._pids = set(start_ups)


def _size(worker: WorkerRecord) -> Size:
    return worker.size or Size()


def _part(mine: WorkerRecord, workers: Sequence[WorkerRecord]) -> float:
    """Return the share of the work of the group of ``mine`` among all workers, by capacity."""
    group = [worker for worker in workers if worker.serves == mine.serves]
    capacity = sum(_size(worker).capacity for worker in workers)
    if not capacity:
        return len(group) / len(workers)
    return sum(_size(worker).capacity for worker in group) / capacity


def _score(workers: Sequence[WorkerRecord], key: str) -> float | None:
    """Return the mean score of the workers that know one, weighted by capacity."""
    scores = [worker.services[key].score or 0.0 for worker in workers]
    if not any(scores):
        return None
    capacities = [max(1, _size(worker).capacity) for worker in workers]
    weights = [capacity if score else 0 for capacity, score in zip(capacities, scores, strict=True)]
    return statistics.fmean(scores, weights)
