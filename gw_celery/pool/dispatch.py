"""Which input goes to which child: queues by service, slots by child; no clock, no I/O."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from gw_celery.declare import services

if TYPE_CHECKING:
    from gw_celery.pool.child_process import ChildProcess
    from gw_celery.pool.request import PoolRequest


class Slots:
    """The slots of one child: how many inputs of each service it holds, and may hold."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._slots = slots
        self._taken: collections.Counter[str] = collections.Counter()
        self.total_taken = 0
        #: Services whose readiness probes fail: they take nothing new here.
        self.unready: set[str] = set()
        #: A suspect runs alone here, or will: nothing else is taken.
        self.is_reserved = False
        self.is_alone = False

    def serves(self, service: str) -> bool:
        """Whether inputs of a service may start here, when there is a slot."""
        return self._key(service) not in self.unready

    def has_free(self, service: str) -> bool:
        key = self._key(service)
        return self.serves(service) and self._taken[key] < self._slots[key]

    def take(self, service: str, *, runs_alone: bool = False) -> None:
        self._taken[self._key(service)] += 1
        self.total_taken += 1
        if runs_alone:
            self.is_reserved = self.is_alone = True

    def give_back(self, service: str) -> None:
        self._taken[self._key(service)] -= 1
        self.total_taken -= 1
        if self.total_taken == 0:
            self.is_reserved = self.is_alone = False

    def _key(self, service: str) -> str:
        # A task of a service that this worker does not serve finds out in the child.
        return service if service in self._slots else services.PLAIN


class Queue:
    """Inputs that wait for a slot, first in first out within their service.

    Suspects, inputs that were in flight when a child died, run one at a time on a child that
    holds nothing else.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, collections.deque[PoolRequest]] = {}
        self._suspects: collections.deque[PoolRequest] = collections.deque()

    def __len__(self) -> int:
        return len(self._suspects) + sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[PoolRequest]:
        return itertools.chain(self._suspects, *self._waiting.values())

    def of(self, service: str) -> list[PoolRequest]:
        """Return what waits for a service, without suspects."""
        return list(self._waiting.get(service, ()))

    def by_service(self) -> dict[str, int]:
        """Return how many inputs of each service wait, without suspects."""
        return {service: len(queue) for service, queue in self._waiting.items()}

    def put(self, waiting: PoolRequest, *, is_first: bool = False) -> None:
        """Add an input; ``is_first`` for one that comes back from a child that is gone."""
        queue = self._queue_of(waiting)
        (queue.appendleft if is_first else queue.append)(waiting)

    def remove(self, waiting: PoolRequest) -> None:
        """Take out an input that waits here."""
        self._queue_of(waiting).remove(waiting)

    def assign(
        self, children: Iterable[ChildProcess]
    ) -> Iterator[tuple[PoolRequest, ChildProcess]]:
        """Yield what can start now, and where; the caller takes it out before the next one.

        Args:
            children: those that may get inputs; the caller takes a slot of the one yielded.
        """
        candidates = list(children)
        if self._suspects:
            yield from self._assign_suspects(candidates)
        else:
            for child in candidates:  # reserved for a suspect that was taken out
                child.slots.is_reserved = child.slots.is_alone
        for queue in list(self._waiting.values()):
            while queue and (free := least_loaded(candidates, queue[0].service)) is not None:
                yield queue[0], free

    def _assign_suspects(
        self, children: Sequence[ChildProcess]
    ) -> Iterator[tuple[PoolRequest, ChildProcess]]:
        service = self._suspects[0].service
        reserved = [child for child in children if child.slots.is_reserved]
        able = [child for child in children if child.slots.serves(service)]
        if not reserved and able:
            reserved = [min(able, key=lambda child: child.slots.total_taken)]
            reserved[0].slots.is_reserved = True
        for child in reserved:
            if child.slots.total_taken == 0 and self._suspects:
                yield self._suspects[0], child
                # It was revoked, and took no slot.
                child.slots.is_reserved = child.slots.is_alone

    def _queue_of(self, waiting: PoolRequest) -> collections.deque[PoolRequest]:
        if waiting.runs_alone:
            return self._suspects
        return self._waiting.setdefault(waiting.service, collections.deque())


def least_loaded(children: Iterable[ChildProcess], service: str) -> ChildProcess | None:
    """Return the child with the fewest inputs among those with a slot; ``None`` without one."""
    able = [
        child for child in children if not child.slots.is_reserved and child.slots.has_free(service)
    ]
    return min(able, key=lambda child: child.slots.total_taken, default=None)
