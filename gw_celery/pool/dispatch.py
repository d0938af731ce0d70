"""Which input goes to which child: queues by service, slots by child; no clock, no I/O."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from gw_celery.declare import services


class Input(Protocol):
    """One input that waits for a slot."""

    @property
    def service(self) -> str: ...

    @property
    def runs_alone(self) -> bool: ...


class Room:
    """The slots of one child: how many inputs of each service it holds, and may hold."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._slots = slots
        self._held: collections.Counter[str] = collections.Counter()
        self.total = 0
        #: Services whose readiness probes fail: they take nothing new here.
        self.unready: set[str] = set()
        #: A suspect runs alone here, or will: nothing else is taken.
        self.is_reserved = False
        self.is_alone = False

    def serves(self, service: str) -> bool:
        """Whether inputs of a service may start here, when there is a slot."""
        return self._key(service) not in self.unready

    def has_slot(self, service: str) -> bool:
        key = self._key(service)
        return self.serves(service) and self._held[key] < self._slots[key]

    def take(self, service: str) -> None:
        self._held[self._key(service)] += 1
        self.total += 1

    def give_back(self, service: str) -> None:
        self._held[self._key(service)] -= 1
        self.total -= 1
        if self.total == 0:
            self.is_reserved = self.is_alone = False

    def _key(self, service: str) -> str:
        # A task of a service that this worker does not serve finds out in the child.
        return service if service in self._slots else services.PLAIN


@dataclasses.dataclass(frozen=True)
class Assignment:
    """An input and the child that takes it."""

    input: Any
    child: Any


class Dispatcher:
    """Inputs that wait for a slot, first in first out within their service.

    Suspects, inputs that were in flight when a child died, run one at a time on a child that
    holds nothing else.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, collections.deque[Any]] = {}
        self._suspects: collections.deque[Any] = collections.deque()

    def __len__(self) -> int:
        return len(self._suspects) + sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Any]:
        yield from self._suspects
        for queue in self._waiting.values():
            yield from queue

    def by_service(self) -> dict[str, int]:
        """Return how many inputs of each service wait, without suspects."""
        return {service: len(queue) for service, queue in self._waiting.items()}

    def put(self, one: Input, *, first: bool = False) -> None:
        """Add an input; ``first`` for one that comes back from a child that is gone."""
        if one.runs_alone:
            queue = self._suspects
        else:
            queue = self._waiting.setdefault(one.service, collections.deque())
        (queue.appendleft if first else queue.append)(one)

    def remove(self, one: Input) -> bool:
        """Take out a waiting input; whether it was there."""
        for queue in (self._suspects, self._waiting.get(one.service, collections.deque())):
            try:
                queue.remove(one)
            except ValueError:
                continue
            return True
        return False

    def take_out(self, service: str) -> list[Any]:
        """Take out and return what waits for a service, but no suspects."""
        return list(self._waiting.pop(service, ()))

    def clear(self) -> list[Any]:
        """Take out and return everything."""
        waiting = list(self)
        self._waiting.clear()
        self._suspects.clear()
        return waiting

    def assign(self, children: Iterable[Any]) -> Iterator[Assignment]:
        """Yield what can start now; a child has a ``room``, and takes what is yielded."""
        open_to = list(children)
        if self._suspects:
            yield from self._assign_suspect(open_to)
        else:
            for child in open_to:  # reserved for a suspect that was taken out
                child.room.is_reserved = child.room.is_alone
        for queue in self._waiting.values():
            while queue:
                child = _roomiest(open_to, queue[0].service)
                if child is None:
                    break
                one = queue.popleft()
                child.room.take(one.service)
                yield Assignment(one, child)

    def _assign_suspect(self, open_to: list[Any]) -> Iterator[Assignment]:
        reserved = [one for one in open_to if one.room.is_reserved]
        able = [one for one in open_to if one.room.serves(self._suspects[0].service)]
        if not reserved and able:
            chosen = min(able, key=lambda one: one.room.total)
            chosen.room.is_reserved = True
            reserved = [chosen]
        for child in reserved:
            if child.room.total == 0 and self._suspects:
                one = self._suspects.popleft()
                child.room.take(one.service)
                child.room.is_reserved = child.room.is_alone = True
                yield Assignment(one, child)


def _roomiest(children: list[Any], service: str) -> Any:
    """The child with the fewest inputs among those with a slot; ``None`` without one."""
    best = None
    for child in children:
        room = child.room
        if room.is_reserved or not room.has_slot(service):
            continue
        if best is None or room.total < best.room.total:
            best = child
    return best
