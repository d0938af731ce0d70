"""Which of a cluster's replicas are this worker's: pure, and the same in all that have the facts.

Each worker that serves a queue computes the same number of desired replicas from the same facts.
The replicas are given to workers in Webster's order, as a parliament is apportioned: the k-th
replica of a worker has the value ``(k - 1/2) / capacity``, and the lowest values are taken first.
Workers need not agree, and one replica more never moves another: growth by one starts just one.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Peer:
    """A worker that serves the same queue."""

    #: Its node name: who is first where two are worth the same.
    name: str
    #: Replicas that it could have now; one that fails to start is none.
    capacity: int
    #: Replicas that it has in any case.
    least: int = 0
    #: The weight of each of them, above 0: the worker's score, where the workers' scores differ.
    score: float = 1.0


def own_positions(peers: Iterable[Peer], me: str) -> list[int]:
    """Where my replicas come in the order of all, ascending; positions count from 1."""
    return [position for position, name in enumerate(order(peers), start=1) if name == me]


def part(positions: list[int], desired: int) -> int:
    """My replicas, if there are to be ``desired`` in all."""
    return bisect.bisect_right(positions, desired)


def order(peers: Iterable[Peer]) -> Iterator[str]:
    """Name the worker of the first replica, of the second, and so on: minimums, then by value."""
    known = sorted(peers, key=lambda peer: peer.name)
    for peer in known:
        for _ in range(min(peer.least, peer.capacity)):
            yield peer.name
    yield from _by_value(known)


def _by_value(peers: list[Peer]) -> Iterator[str]:
    waiting = [
        (_value(peer, taken), peer.name, taken, peer)
        for peer in peers
        if (taken := min(peer.least, peer.capacity)) < peer.capacity
    ]
    heapq.heapify(waiting)
    while waiting:
        _, name, taken, peer = waiting[0]
        yield name
        if taken + 1 < peer.capacity:
            heapq.heapreplace(waiting, (_value(peer, taken + 1), name, taken + 1, peer))
        else:
            heapq.heappop(waiting)


def _value(peer: Peer, taken: int) -> float:
    return (taken + 0.5) / (peer.capacity * peer.score)
