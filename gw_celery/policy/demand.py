"""How many replicas the work of a service needs, and which part of it is this worker's; pure.

Workers that serve the same are a group: each computes what the whole group needs from the same
records, and takes its part. Work that several groups share is divided by their capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

from gw_celery.policy import apportionment, scaling
from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import ServiceRecord, Size, WorkerRecord

#: Groups whose order is remembered: this worker as it is and as it would be whole, in turns.
_MOST_KNOWN = 4


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
        mean = _mean(parts)
        came = inside * self._came(workers) + share * mean * self._grown(queued)
        self._meter.add(now, came)
        waits = inside * sum(part.waiting for part in parts) + share * mean * (queued or 0)
        inputs = inside * sum(part.waiting_inputs for part in parts) + share * (queued or 0)
        running = inside * sum(part.running_inputs for part in parts)
        score = _score(workers, parts)
        need, keep = self._needs(waits, inputs, running, score)
        if queued is None and self._is_full(inputs + running, _size(mine).replicas):
            # No more is taken than there are slots for: what else waits is not known.
            need = max(need, _size(mine).replicas + 1.0)
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

    def _needs(
        self, waits: float, inputs: float, running: float, score: float | None
    ) -> tuple[float, float]:
        """Replicas for what is there, and for its bursts to come again."""
        if score is None:
            # What a replica can do is not known: as many as hold all inputs.
            held = (inputs + running) / self._target
            return held, held
        need = scaling.need(self._meter.rate, waits, score, self._rules, inputs / self._target)
        return need, scaling.kept(self._meter.pace, score, self._rules)

    def _is_full(self, inputs: float, replicas: int) -> bool:
        return replicas > 0 and inputs >= self._target * replicas

    def _came(self, workers: Sequence[WorkerRecord]) -> float:
        """Workload that workers have taken since the last look: of those that were there then."""
        before = self._taken
        self._taken = {worker.incarnation: worker.services[self._key].taken for worker in workers}
        return sum(taken - before[name] for name, taken in self._taken.items() if name in before)

    def _grown(self, queued: int | None) -> int:
        before, self._queued = self._queued, queued
        return 0 if before is None or queued is None else queued - before


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


class Apportionment:
    """This worker's part of the replicas of its group, worked out anew when the group changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[apportionment.Peer, ...], list[int]] = {}

    def part(self, group: Sequence[WorkerRecord], me: str, total: int) -> int:
        """Return how many of ``total`` replicas are those of ``me``."""
        peers = _peers(group)
        if (positions := self._known.get(peers)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            positions = self._known[peers] = apportionment.own_positions(peers, me)
        return apportionment.part(positions, total)


def _size(worker: WorkerRecord) -> Size:
    return worker.size or Size()


def _peers(group: Sequence[WorkerRecord]) -> tuple[apportionment.Peer, ...]:
    """Weighed by their scores where these differ; what differs little must not move a replica."""
    first = next(iter(group[0].services))
    scores = [worker.services[first].score for worker in group]
    known = [score for score in scores if score]
    slowest = min(known) if len(known) == len(group) else None
    return tuple(
        apportionment.Peer(
            worker.worker,
            _size(worker).capacity,
            _size(worker).least,
            1.0 if slowest is None or not score else float(round(2 * score / slowest)) / 2,
        )
        for worker, score in zip(group, scores, strict=True)
    )


def _part(mine: WorkerRecord, workers: Sequence[WorkerRecord]) -> float:
    """The part of the work that falls to the workers that serve what this one serves."""
    group = [worker for worker in workers if worker.serves == mine.serves]
    capacity = sum(_size(worker).capacity for worker in workers)
    if not capacity:
        return len(group) / len(workers)
    return sum(_size(worker).capacity for worker in group) / capacity


def _mean(parts: Sequence[ServiceRecord]) -> float:
    """The workload of one input: the mean of the workers, by how much each has taken."""
    weight = sum(part.taken + 1.0 for part in parts)
    return sum(part.mean * (part.taken + 1.0) for part in parts) / weight


def _score(workers: Sequence[WorkerRecord], parts: Sequence[ServiceRecord]) -> float | None:
    known = [
        (part.score, max(1, _size(worker).capacity))
        for worker, part in zip(workers, parts, strict=True)
        if part.score
    ]
    if not known:
        return None
    return sum(score * weight for score, weight in known) / sum(weight for _, weight in known)
