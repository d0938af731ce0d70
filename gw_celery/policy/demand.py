"""How many replicas the work of a service needs, and which part of it is this worker's; pure.

Workers that serve the same are a group: each computes what the whole group needs from the same
facts, and takes its part. Work that several groups share is divided by their capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gw_celery.cluster import records
from gw_celery.policy import apportionment, scaling
from gw_celery.protocol import snapshot

#: Groups whose order is remembered: this worker as it is and as it would be whole, in turns.
_MOST_KNOWN = 4


class Service:
    """One service, as the group of this worker sees it.

    Args:
        target: inputs of it that a replica is meant to hold at a time.
    """

    def __init__(self, target: int, rules: scaling.Rules, now: float) -> None:
        self._target = target
        self._rules = rules
        self._meter = scaling.Meter(rules, now)
        self._taken: dict[tuple[str, str], float] = {}
        self._queued: int | None = None

    def see(
        self,
        now: float,
        mine: records.Facts,
        others: Sequence[records.Facts] | None,
        *,
        queued: int | None = None,
        consumers: int | None = None,
    ) -> snapshot.Outlook:
        """Return the outlook as of ``now``; called once a second.

        Args:
            others: the other workers that serve it; ``None`` when they cannot be known.
            queued: messages in the broker; ``None`` when it does not tell.
            consumers: workers that take from there, where no more than their number is known.
        """
        workers = [mine, *(others or ())]
        # What is in other workers is known with them; what is in the queue always.
        inside = share = _part(mine, workers)
        if others is None:
            share = 1.0 / max(1, consumers or 1)
        mean = _mean(workers)
        came = inside * self._came(workers) + share * mean * self._grown(queued)
        self._meter.add(now, came)
        waits = inside * sum(one.waiting for one in workers) + share * mean * (queued or 0)
        inputs = inside * sum(one.waiting_inputs for one in workers) + share * (queued or 0)
        running = inside * sum(one.running_inputs for one in workers)
        score = _score(workers)
        need, keep = self._needs(waits, inputs, running, score)
        if queued is None and self._is_full(inputs + running, mine.replicas):
            # No more is taken than there are slots for: what else waits nobody can tell.
            need = max(need, mine.replicas + 1.0)
        return snapshot.Outlook(
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

    def _came(self, workers: Sequence[records.Facts]) -> float:
        """Workload that workers have taken since the last look: of those that were there then."""
        before = self._taken
        self._taken = {(one.worker, one.life): one.taken for one in workers}
        return sum(taken - before[one] for one, taken in self._taken.items() if one in before)

    def _grown(self, queued: int | None) -> int:
        before, self._queued = self._queued, queued
        return 0 if before is None or queued is None else queued - before


def group_of(
    mine: Mapping[str, records.Facts], peers: Mapping[str, Sequence[records.Facts]] | None
) -> list[records.Facts]:
    """Return the workers that serve the same as this one, which comes first."""
    any_service, me = next(iter(mine.items()))
    others = () if peers is None else peers.get(any_service, ())
    return [me, *(one for one in others if one.serves == me.serves)]


class Seats:
    """This worker's part of the replicas of its group, worked out anew when the group changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[apportionment.Peer, ...], list[int]] = {}

    def part(self, group: Sequence[records.Facts], me: str, total: int) -> int:
        """Return how many of ``total`` replicas are those of ``me``."""
        peers = _peers(group)
        if (positions := self._known.get(peers)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            positions = self._known[peers] = apportionment.own_positions(peers, me)
        return apportionment.part(positions, total)


def _peers(group: Sequence[records.Facts]) -> tuple[apportionment.Peer, ...]:
    """Weighed by their scores where these differ; what differs little must not move a replica."""
    scores = [one.score for one in group if one.score]
    slowest = min(scores) if len(scores) == len(group) else None
    return tuple(
        apportionment.Peer(
            one.worker,
            one.capacity,
            one.least,
            1.0 if slowest is None or not one.score else float(round(2 * one.score / slowest)) / 2,
        )
        for one in group
    )


def _part(mine: records.Facts, workers: Sequence[records.Facts]) -> float:
    """The part of the work that falls to the workers that serve what this one serves."""
    group = [one for one in workers if one.serves == mine.serves]
    capacity = sum(one.capacity for one in workers)
    if not capacity:
        return len(group) / len(workers)
    return sum(one.capacity for one in group) / capacity


def _mean(workers: Sequence[records.Facts]) -> float:
    """The workload of one input, as those know who have taken most."""
    weight = sum(one.taken + 1.0 for one in workers)
    return sum(one.mean * (one.taken + 1.0) for one in workers) / weight


def _score(workers: Sequence[records.Facts]) -> float | None:
    known = [(one.score, max(1, one.capacity)) for one in workers if one.score]
    if not known:
        return None
    return sum(score * weight for score, weight in known) / sum(weight for _, weight in known)
