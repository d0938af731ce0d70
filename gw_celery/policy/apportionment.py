"""Which of a cluster's replicas are this worker's: pure, and the same in all that have the facts.

Each worker that serves a queue computes the same number of desired replicas from the same facts.
The replicas are given to workers in Webster's order, as a parliament is apportioned: the k-th
replica of a worker has the value ``(k - 1/2) / capacity``, and the lowest values are taken first.
Workers need not agree, and one replica more never moves another: growth by one starts just one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable


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


def part(peers: tuple[Peer, ...], me: str, desired: int) -> int:
    """Return my replicas, if there are to be ``desired`` in all."""
    return bisect.bisect_right(_own_positions(peers, me), desired)


# For this worker as it is and as it would be whole, in turns.
@functools.lru_cache(maxsize=4)
def _own_positions(peers: tuple[Peer, ...], me: str) -> list[int]:
    return [position for position, name in enumerate(order(peers), start=1) if name == me]


def order(peers: Iterable[Peer]) -> list[str]:
    """Name the worker of the first replica, of the second, and so on: minimums, then by value."""
    known = sorted(peers, key=lambda peer: peer.name)
    least = [peer.name for peer in known for _ in range(min(peer.least, peer.capacity))]
    by_value = sorted(
        ((taken + 0.5) / (peer.capacity * peer.score), peer.name)
        for peer in known
        for taken in range(min(peer.least, peer.capacity), peer.capacity)
    )
    return [*least, *(name for _, name in by_value)]
