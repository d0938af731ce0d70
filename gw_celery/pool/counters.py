"""How much work of each service a worker has taken, holds and has done; no clock, no I/O."""

from __future__ import annotations

import enum

from gw_celery.protocol import headers, snapshot

#: The weight of the newest input in the mean of all.
_NEWEST = 0.05


class Stage(enum.IntEnum):
    """Where an input counts, as an index: a dict by enum would cost several times as much."""

    WAITING = 0
    RUNNING = 1
    SERVED = 2
    GIVEN_BACK = 3


class Result(enum.Enum):
    """How an input that is settled counts."""

    #: Served, with a value.
    VALUE = enum.auto()
    #: Served, without one.
    NO_VALUE = enum.auto()
    #: The same; it had waited for too long, and never began.
    REFUSED = enum.auto()
    #: It did not run to its end here: lost, revoked, expired, or the broker's again.
    GIVEN_BACK = enum.auto()


class _Sums:
    """The running sums of one service."""

    def __init__(self) -> None:
        self.workload = [0.0] * len(Stage)
        self.inputs = [0] * len(Stage)
        self.arrived = 0.0
        self.mean = headers.DEFAULT_WORKLOAD
        self.arrived_inputs = 0
        self.busy = 0.0
        self.failed = 0.0
        self.refused = 0.0
        self.refused_inputs = 0

    def move(self, workload: float, before: Stage, stage: Stage) -> None:
        self.inputs[before] -= 1
        # What rounding left must not add up for as long as the worker lives.
        self.workload[before] = self.workload[before] - workload if self.inputs[before] else 0.0
        self.workload[stage] += workload
        self.inputs[stage] += 1

    def as_snapshot(self) -> snapshot.Counters:
        workload = [max(0.0, value) for value in self.workload]
        return snapshot.Counters(
            arrived=self.arrived,
            served=workload[Stage.SERVED],
            failed=self.failed,
            refused=self.refused,
            refused_inputs=self.refused_inputs,
            waiting=workload[Stage.WAITING],
            running=workload[Stage.RUNNING],
            given_back=workload[Stage.GIVEN_BACK],
            arrived_inputs=self.arrived_inputs,
            served_inputs=self.inputs[Stage.SERVED],
            waiting_inputs=self.inputs[Stage.WAITING],
            running_inputs=self.inputs[Stage.RUNNING],
            given_back_inputs=self.inputs[Stage.GIVEN_BACK],
            mean=self.mean,
            busy=self.busy,
        )


class Counters:
    """The sums of all services; an input is settled once, and not moved after that."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def arrive(self, service: str, workload: float) -> None:
        """Count an input that waits for a slot."""
        sums = self._sums.setdefault(service, _Sums())
        sums.mean += (_NEWEST if sums.arrived_inputs else 1.0) * (workload - sums.mean)
        sums.arrived += workload
        sums.arrived_inputs += 1
        sums.workload[Stage.WAITING] += workload
        sums.inputs[Stage.WAITING] += 1

    def move(self, service: str, workload: float, before: Stage, stage: Stage) -> None:
        """Count an input that has a slot, or lost it before it began."""
        self._sums[service].move(workload, before, stage)

    def settle(
        self, service: str, workload: float, before: Stage, result: Result, busy: float = 0.0
    ) -> None:
        """Count an input that is answered, or given back.

        Args:
            busy: seconds that it had a slot.
        """
        sums = self._sums[service]
        if result is Result.GIVEN_BACK:
            sums.move(workload, before, Stage.GIVEN_BACK)
            return
        sums.move(workload, before, Stage.SERVED)
        sums.busy += busy
        if result is not Result.VALUE:
            sums.failed += workload
        if result is Result.REFUSED:
            sums.refused += workload
            sums.refused_inputs += 1

    def as_snapshot(self) -> dict[str, snapshot.Counters]:
        """Return what each service has been given and has done, as it is now."""
        return {service: sums.as_snapshot() for service, sums in self._sums.items()}
