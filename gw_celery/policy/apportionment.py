"""Which of a cluster's replicas are this worker's: pure, the same for everybody who has the facts.

Each worker that serves a queue computes the same number of desired replicas from the same facts.
The replicas are seats, as of a parliament, and workers are given them in Webster's order: the k-th
seat of a worker has the value ``(k - 1/2) / capacity``, and the lowest values are taken first.
Nobody has to be asked, and one seat more never moves another: growing by one starts one replica on
one worker.
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
    """Where my seats come in the order of all seats, ascending; positions count from 1."""
    return [position for position, name in enumerate(order(peers), start=1) if name == me]


def part(positions: list[int], desired: int) -> int:
    """My replicas, if there are to be ``desired`` in all."""
    return bisect.bisect_right(positions, desired)


def order(peers: Iterable[Peer]) -> Iterator[str]:
    """Whose the first seat is, whose the second, and so on: the minimums, then by value."""
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
