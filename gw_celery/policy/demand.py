"""How many replicas the work of a service needs, and which part of it is this worker's; pure.

Workers that serve the same are a group: each computes what the whole group needs from the same
records, and takes its part. Work that several groups share is divided by their capacity.
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

#: Weight of the newest start-up in the mean.
_NEWEST = 0.5
_LOADING = frozenset({"starting", "entering", "probing", "benchmarking"})


class Service:
    """One service, as the group of this worker sees it.

    Args:
        key: of the service.
        target: inputs of it that a replica is meant to hold at a time.
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
        """Return the demand as of ``now``; called once a second.

        Args:
            others: the other workers that serve it; ``None`` when they cannot be known.
            queued: messages in the broker; ``None`` when it does not tell.
            consumers: workers that take from there, where no more than their number is known.
        """
        workers = [mine, *(others or ())]
        parts = [worker.services[self._key] for worker in workers]
        # What is in other workers is known with them; what is in the queue always.
        inside = share = _part(mine, workers)
        if others is None:
            share = 1.0 / max(1, consumers or 1)
        # The workload of one input: the mean of the workers, by how much each has taken.
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
            # What a replica can do is not known: as many as hold all inputs.
            need = keep = filled
        else:
            fillable = inputs / self._target
            need = scaling.need(self._meter.rate, waits, score, self._rules, fillable)
            keep = scaling.kept(self._meter.pace, score, self._rules)
        if queued is None and filled >= (replicas := _size(mine).replicas) > 0:
            # No more is taken than there are slots for: what else waits is not known.
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
        """Workload that workers have taken since the last look: of those that were there then."""
        before = self._taken
        self._taken = {worker.incarnation: worker.services[self._key].taken for worker in workers}
        return sum(taken - before[name] for name, taken in self._taken.items() if name in before)


def size_of(worker: snapshot.Worker, least: int, most: int) -> Size:
    """Return the replicas of a worker as the others are told them.

    Args:
        least: replicas that it keeps whatever the load.
        most: replicas that it may have.
    """
    replicas = worker.replicas
    missing = sum(replica.state == "failed" and replica.restarts > 0 for replica in replicas)
    held = sum(replica.state == "stopped" for replica in replicas)
    # Of a worker that an operator has drained, others have to do the work.
    missing += most if held and held == len(replicas) else held
    return Size(
        least=least,
        capacity=max(0, most - missing),
        replicas=max(len(replicas), worker.desired),
    )


def sharing(
    mine: WorkerRecord, others: Sequence[WorkerRecord] | None, key: str
) -> list[WorkerRecord] | None:
    """Return those of the others that follow the load and consume the same queues of a service."""
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
    """Return the workers that serve the same as this one, which comes first."""
    first = next(iter(mine.services))
    alike = sharing(mine, others, first) or []
    return [mine, *(other for other in alike if other.serves == mine.serves)]


def part(group: Sequence[WorkerRecord], total: int) -> int:
    """Return how many of ``total`` replicas of a group are those of its first worker.

    Weighed by their scores where these differ; what differs little must not move a replica.
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
    """A worker that serves the same, for those that divide the replicas."""

    #: Its node name: who is first where two are worth the same.
    name: str
    #: Replicas that it could have now; one that fails to start is none.
    capacity: int
    #: Replicas that it has in any case.
    least: int = 0
    #: The weight of each of them, above 0: the worker's score, where the workers' scores differ.
    score: float = 1.0


# For this worker as it is and as it would be whole, in turns.
@functools.lru_cache(maxsize=4)
def _own_positions(peers: tuple[Peer, ...], me: str) -> list[int]:
    return [position for position, name in enumerate(order(peers), start=1) if name == me]


def order(peers: Iterable[Peer]) -> list[str]:
    """Name the worker of the first replica, of the second, and so on: minimums, then by value.

    That is Webster's order, as a parliament is apportioned: the k-th replica of a worker has the
    value ``(k - 1/2) / capacity``, and the lowest values are taken first. So workers that have the
    same facts need not agree, and one replica more never moves another: growth by one starts just
    one.
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
        #: A child is loading: a worker with a replica on its way is not idle.
        self.is_loading = False
        self._pids: set[int] = set()

    def observe(self, replicas: Iterable[snapshot.Replica]) -> None:
        """Learn from the replicas; each child counts once, when it has been READY."""
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
    """The part of the work that falls to the workers that serve what this one serves."""
    group = [worker for worker in workers if worker.serves == mine.serves]
    capacity = sum(_size(worker).capacity for worker in workers)
    if not capacity:
        return len(group) / len(workers)
    return sum(_size(worker).capacity for worker in group) / capacity


def _score(workers: Sequence[WorkerRecord], key: str) -> float | None:
    """The mean of those that know it, by the replicas that each could have."""
    scores = [worker.services[key].score or 0.0 for worker in workers]
    if not any(scores):
        return None
    capacities = [max(1, _size(worker).capacity) for worker in workers]
    weights = [capacity if score else 0 for capacity, score in zip(capacities, scores, strict=True)]
    return statistics.fmean(scores, weights)
