"""How many replicas the work of a service needs, and which part of it is this worker's; pure.

Workers that serve the same are a group: each computes what the whole group needs from the same
facts, and takes its part. Work that several groups share is divided by their capacity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gw_celery import snapshot
from gw_celery.autoscale import facts, policy


def see(
    mine: facts.Facts,
    others: Iterable[facts.Facts] | None,
    *,
    queued: int | None,
    growth: float,
    consumers: int | None,
    slots: int,
    rules: policy.Rules,
) -> snapshot.Outlook:
    """Return the outlook of one service.

    Args:
        others: the other workers that serve it; ``None`` when they cannot be known.
        growth: messages a second by which the queue grows; less than 0 where it shrinks.
        consumers: workers that consume the queue, where only their number is known.
        slots: inputs of it that a replica holds at a time.
    """
    all_of_us = [mine, *(others or ())]
    group = [one for one in all_of_us if one.serves == mine.serves]
    mean = _mean(all_of_us)
    if others is None:
        share = 1.0 / max(1, consumers or 1)
        inside, queue_share = 1.0, share
    else:
        inside = queue_share = share = _part(group, all_of_us)
    rate = max(0.0, inside * sum(one.rate for one in all_of_us) + queue_share * growth * mean)
    waits = queue_share * (queued or 0)
    backlog = waits * mean + inside * sum(one.load for one in all_of_us)
    inputs = waits + inside * sum(one.inputs for one in all_of_us)
    score = _score(all_of_us)
    return snapshot.Outlook(
        queued=queued,
        share=share,
        rate=rate,
        backlog=backlog,
        score=score,
        # What a replica can do is not known: as many as hold all inputs.
        need=inputs / slots if score is None else policy.need(rate, backlog, score, rules),
    )


def group_of(
    mine: Mapping[str, facts.Facts], peers: Mapping[str, Sequence[facts.Facts]] | None
) -> list[facts.Facts]:
    """Return the workers that serve the same as this one, itself among them."""
    any_service, me = next(iter(mine.items()))
    others = () if peers is None else peers.get(any_service, ())
    return [me, *(one for one in others if one.serves == me.serves)]


def _part(group: Sequence[facts.Facts], everybody: Sequence[facts.Facts]) -> float:
    capacity = sum(one.capacity for one in everybody)
    if not capacity:
        return len(group) / len(everybody)
    return sum(one.capacity for one in group) / capacity


def _mean(workers: Sequence[facts.Facts]) -> float:
    """The workload of one input: of those that see the most, mostly."""
    weight = sum(one.inputs + 1 for one in workers)
    return sum(one.mean * (one.inputs + 1) for one in workers) / weight


def _score(workers: Sequence[facts.Facts]) -> float | None:
    known = [(one.score, max(1, one.capacity)) for one in workers if one.score]
    if not known:
        return None
    return sum(score * weight for score, weight in known) / sum(weight for _, weight in known)
