"""The fixed pool that one would have chosen, had one known the trace."""

from __future__ import annotations

import collections
import dataclasses
import heapq

from gw_celery.simulate import trace as traces

#: The share of inputs that a pool may serve too late and still be good.
FORGIVEN = 0.01


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A pool of constant size: how many, and what they cost until the last input ended."""

    replicas: int
    replica_seconds: float


def best(
    trace: traces.Trace, score: float, target_queue_time: float, queue_limit: int | None = None
) -> Fixed:
    """The smallest constant size with at most 1 % of inputs over target or turned away."""
    few, many = 0, len(trace)
    while many - few > 1:
        middle = (few + many) // 2
        late, _ = _late(trace, score, middle, target_queue_time, queue_limit)
        few, many = (few, middle) if late <= FORGIVEN * len(trace) else (middle, many)
    _, end = _late(trace, score, many, target_queue_time, queue_limit)
    return Fixed(many, many * end)


def _late(
    trace: traces.Trace, score: float, size: int, target: float, limit: int | None
) -> tuple[int, float]:
    """How many inputs are over target or turned away, and when the last one ends."""
    free = [0.0] * size
    waiting: collections.deque[float] = collections.deque()
    late, end = 0, trace.seconds
    for at, workload in zip(trace.times, trace.workloads, strict=True):
        while waiting and waiting[0] <= at:
            waiting.popleft()
        if limit is not None and len(waiting) >= limit:
            late += 1
            continue
        start = max(at, free[0])
        if start > at:
            waiting.append(start)
            late += start - at > target
        heapq.heapreplace(free, start + workload / score)
        end = max(end, start + workload / score)
    return late, end
