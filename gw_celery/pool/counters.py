"""How much work of each service a worker has taken, holds and has done; no clock, no I/O."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from gw_celery.protocol import headers, snapshot

#: The weight of the newest input in the mean of all.
_NEWEST = 0.05


def workload_of(request: Mapping[str, Any]) -> float:
    """Return the workload that a message carries; anything odd, or nothing, counts as 1.0."""
    return headers.workload_of(request)


class _Place(enum.IntEnum):
    """Where an input is, as an index: a dict by enum would cost several times as much."""

    WAITING = 0
    RUNNING = 1
    SERVED = 2
    GIVEN_BACK = 3


@dataclasses.dataclass(slots=True)
class _Held:
    """One input that is not answered."""

    service: str
    workload: float
    place: _Place = _Place.WAITING
    since: float = 0.0


class _Sums:
    """The running sums of one service."""

    def __init__(self) -> None:
        self.workload = [0.0] * len(_Place)
        self.inputs = [0] * len(_Place)
        self.arrived = 0.0
        self.mean = headers.DEFAULT_WORKLOAD
        self.arrived_inputs = 0
        self.busy = 0.0
        self.failed = 0.0
        self.refused = 0.0
        self.refused_inputs = 0

    def arrive(self, workload: float) -> None:
        weight = _NEWEST if self.arrived_inputs else 1.0
        self.mean += weight * (workload - self.mean)
        self.arrived += workload
        self.arrived_inputs += 1
        self.add(_Place.WAITING, workload)

    def add(self, place: _Place, workload: float) -> None:
        self.workload[place] += workload
        self.inputs[place] += 1

    def take(self, place: _Place, workload: float) -> None:
        self.inputs[place] -= 1
        # What rounding left must not add up for as long as the worker lives.
        self.workload[place] = self.workload[place] - workload if self.inputs[place] else 0.0

    def seen(self) -> snapshot.Counters:
        workload = [max(0.0, one) for one in self.workload]
        return snapshot.Counters(
            arrived=self.arrived,
            served=workload[_Place.SERVED],
            failed=self.failed,
            refused=self.refused,
            refused_inputs=self.refused_inputs,
            waiting=workload[_Place.WAITING],
            running=workload[_Place.RUNNING],
            given_back=workload[_Place.GIVEN_BACK],
            arrived_inputs=self.arrived_inputs,
            served_inputs=self.inputs[_Place.SERVED],
            waiting_inputs=self.inputs[_Place.WAITING],
            running_inputs=self.inputs[_Place.RUNNING],
            given_back_inputs=self.inputs[_Place.GIVEN_BACK],
            mean=self.mean,
            busy=self.busy,
        )


class Tallies:
    """Follows inputs by their numbers; an input that is not held, or no longer, is ignored."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._sums: dict[str, _Sums] = {}

    def arrive(self, number: int, service: str, workload: float) -> None:
        """An input waits for a slot."""
        self._held[number] = _Held(service, workload)
        self._of(service).arrive(workload)

    def start(self, number: int, now: float) -> None:
        """It has a slot."""
        if (one := self._held.get(number)) is not None:
            self._move(one, _Place.RUNNING)
            one.since = now

    def wait_again(self, number: int) -> None:
        """It has lost its slot before it began."""
        if (one := self._held.get(number)) is not None:
            self._move(one, _Place.WAITING)

    def serve(self, number: int, now: float, *, is_success: bool, is_refused: bool = False) -> None:
        """It is answered after it ran, or in place of that."""
        if (one := self._held.pop(number, None)) is not None:
            if one.place is _Place.RUNNING:
                self._of(one.service).busy += max(0.0, now - one.since)
            if not is_success:
                self._of(one.service).failed += one.workload
            if is_refused:
                self._of(one.service).refused += one.workload
                self._of(one.service).refused_inputs += 1
            self._move(one, _Place.SERVED)

    def give_back(self, number: int) -> None:
        """It has gone for any other reason."""
        if (one := self._held.pop(number, None)) is not None:
            self._move(one, _Place.GIVEN_BACK)

    def seen(self) -> dict[str, snapshot.Counters]:
        """What each service has been given and has done, as it is now."""
        return {service: sums.seen() for service, sums in self._sums.items()}

    def _move(self, one: _Held, to: _Place) -> None:
        sums = self._of(one.service)
        sums.take(one.place, one.workload)
        sums.add(to, one.workload)
        one.place = to

    def _of(self, service: str) -> _Sums:
        found = self._sums.get(service)
        if found is None:
            found = self._sums[service] = _Sums()
        return found
