"""The probes of one child: when each is called, what counts as failed, and what follows.

Pure: ``now`` is an argument. The parent times the calls, for a child that hangs cannot time itself.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence

from gw_celery.declare import probes

#: Seconds between two looks after which the parent could not have read an answer in time.
_PAUSE = 2.0


class Consequence(enum.Enum):
    """What follows from the last answer of a probe, or from its absence."""

    NOTHING = enum.auto()
    #: A startup probe has passed; it is not called again.
    STARTED = enum.auto()
    #: A startup probe failed as often as it may: the child cannot serve.
    CANNOT_START = enum.auto()
    #: A liveness probe failed as often as it may: another child must take over.
    REPLACE = enum.auto()
    #: A readiness probe failed as often as it may: the service wants no inputs here.
    NOT_READY = enum.auto()
    #: A readiness probe passed again, or for the first time.
    READY = enum.auto()


_WHEN_FAILING = {
    "startup": Consequence.CANNOT_START,
    "liveness": Consequence.REPLACE,
    "readiness": Consequence.NOT_READY,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The outcome of one call of a probe."""

    is_ok: bool
    #: Why, in a few words.
    detail: str
    #: How long the call took, by the child's clock.
    seconds: float


class Check:
    """One probe of one service in one child.

    Args:
        service: key of the service.
        probe: the declaration.
        phase: the part of a period by which its calls are shifted against those of other replicas.
    """

    def __init__(self, service: str, probe: probes.Probe, phase: float = 1.0) -> None:
        self.service = service
        self.probe = probe
        #: When it is called next; never, while it is infinite.
        self.due = math.inf
        #: The number of the call on its way; ``None`` without one.
        self.call: int | None = None
        #: Failures in a row.
        self.failures = 0
        self.has_passed = False
        #: It failed as often as it may, and has not passed since.
        self.is_failing = False
        self.last: Answer | None = None
        #: When the call on its way counts as a failure, or as another one.
        self._counts_at = math.inf
        self._is_late = False
        self._was_paused = False
        self._shift = phase * probe.period_s
        self._gap = probe.period_s

    @property
    def name(self) -> str:
        """The service's own name and the method, as its users write them."""
        return f"{self.service.rpartition('.')[2]}.{self.probe.method}"

    @property
    def next_at(self) -> float:
        """When there is something to do: a call, or to stop waiting for one."""
        return self.due if self.call is None else self._counts_at

    def begin(self, now: float) -> None:
        """Have it called from now on; a probe that something waits for, at once."""
        if not math.isinf(self.due):
            return
        if self.probe.kind == "liveness":
            self.due, self._gap = now + self._shift, self.probe.period_s
        else:
            self.due, self._gap = now, self._shift

    def end(self) -> None:
        """Call it no more; what is on its way has no consequence."""
        self.due = self._counts_at = math.inf
        self._is_late = True

    def is_due(self, now: float) -> bool:
        """Whether to call it: never while the last call hangs, or calls would pile up."""
        return self.call is None and now >= self.due

    def called(self, call: int, now: float) -> None:
        """Note that it is being called, as the call of this number."""
        self.call, self._is_late, self._was_paused = call, False, False
        self._counts_at = now + self.probe.timeout_s
        self.due, self._gap = now + self._gap, self.probe.period_s

    def answered(self, answer: Answer) -> Consequence:
        """Take the answer of its call; that of a call that was given up has no consequence."""
        self.call = None
        if self._is_late:
            return Consequence.NOTHING
        if answer.seconds > self.probe.timeout_s:
            # The child gave it up, or the parent was away and has not counted it.
            answer = self._too_late(answer.seconds)
        return self._note(answer)

    def give_up(self, now: float) -> Consequence:
        """Count a call without an answer: at its time-out, and once a period while it hangs."""
        self._is_late = True
        self._counts_at = now + self.probe.period_s
        return self._note(self._too_late(self.probe.timeout_s))

    def pause(self, seconds: float) -> None:
        """Extend a call, once, by the time in which the parent could not read its answer."""
        if not self._was_paused:
            self._was_paused = True
            self._counts_at += seconds

    def _too_late(self, seconds: float) -> Answer:
        detail = f"no answer within {self.probe.timeout_s:g} s"
        return Answer(is_ok=False, detail=detail, seconds=seconds)

    def _note(self, answer: Answer) -> Consequence:
        self.last = answer
        if answer.is_ok:
            is_change = self.is_failing or not self.has_passed
            self.has_passed, self.is_failing, self.failures = True, False, 0
            if self.probe.kind == "startup":
                self.due = math.inf
                return Consequence.STARTED
            is_ready = self.probe.kind == "readiness" and is_change
            return Consequence.READY if is_ready else Consequence.NOTHING
        self.failures += 1
        if self.is_failing or self.failures < self.probe.failures:
            return Consequence.NOTHING
        self.is_failing = True
        return _WHEN_FAILING[self.probe.kind]


class Checks:
    """All probes of one child.

    Args:
        declared: each probe with the key of its service.
        phase: from 0 to 1, another one for each replica, so that they are not all called at once.
    """

    def __init__(self, declared: Sequence[tuple[str, probes.Probe]], phase: float = 1.0) -> None:
        self._checks = [Check(service, probe, phase) for service, probe in declared]
        self._looked: float | None = None
        self._serves = False

    def __iter__(self) -> Iterator[Check]:
        return iter(self._checks)

    @property
    def next_at(self) -> float:
        return min((check.next_at for check in self), default=math.inf)

    @property
    def have_started(self) -> bool:
        """Whether every startup probe has passed."""
        return all(check.has_passed for check in self if check.probe.kind == "startup")

    @property
    def unready(self) -> set[str]:
        """The services that want no inputs: a readiness probe is failing, or never passed."""
        return {
            check.service
            for check in self
            if check.probe.kind == "readiness" and (check.is_failing or not check.has_passed)
        }

    def start(self, now: float) -> None:
        """Call the startup probes from now on."""
        for check in self:
            if check.probe.kind == "startup" and not check.has_passed:
                check.begin(now)

    def serve(self, now: float) -> bool:
        """Call the liveness and readiness probes from now on; whether they were not before."""
        if self._serves:
            return False
        self._serves = True
        for check in self:
            if check.probe.kind != "startup":
                check.begin(now)
        return True

    def drain(self) -> None:
        """Call the liveness probes alone: what drains for long must not hang meanwhile."""
        for check in self:
            if check.probe.kind != "liveness":
                check.end()

    def end(self) -> None:
        """Call nothing any more."""
        for check in self:
            check.end()

    def due(self, now: float) -> list[Check]:
        """Return what is to be called now."""
        return [check for check in self if check.is_due(now)]

    def find(self, call: int) -> Check | None:
        """Return the probe that is being called with this number."""
        return next((check for check in self if check.call == call), None)

    def overdue(self, now: float) -> list[tuple[Check, Consequence]]:
        """Count the calls without an answer in time; return their checks, and what follows."""
        if self._looked is not None and now - self._looked > _PAUSE:
            for check in self:
                check.pause(now - self._looked)
        self._looked = now
        called = [check for check in self if check.call is not None]
        return [(check, check.give_up(now)) for check in called if now >= check.next_at]
