"""The probes of one child: when to call them, what counts as a failure, and what follows.

Pure: ``now`` is an argument. The worker's parent times the calls, because a child that hangs
cannot.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence

from gw_celery.declare import probes

#: Seconds between two checks after which the parent may have been unable to read an answer.
_PAUSE = 2.0


class Consequence(enum.Enum):
    NOTHING = enum.auto()
    #: A startup probe has passed; it is not called again.
    STARTED = enum.auto()
    #: A startup probe reached its allowed failures: the child cannot serve.
    CANNOT_START = enum.auto()
    #: A liveness probe reached its allowed failures: another child must take over.
    REPLACE = enum.auto()
    #: A readiness probe reached its allowed failures: the service takes no inputs here.
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
    is_ok: bool
    #: The reason, in a few words.
    detail: str
    #: Duration of the call, by the child's clock.
    seconds: float


class Check:
    """One probe of one service in one child.

    Args:
        service: key of the service.
        probe: the declaration.
        phase: share of a period by which its calls are shifted from those of other replicas.
    """

    def __init__(self, service: str, probe: probes.Probe, phase: float = 1.0) -> None:
        self.service = service
        self.probe = probe
        #: Time of the next call; infinite: never.
        self.due = math.inf
        #: Number of the pending call, if any.
        self.call: int | None = None
        #: Consecutive failures.
        self.failures = 0
        self.has_passed = False
        #: Whether it reached its allowed failures, and has not passed since.
        self.is_failing = False
        self.last: Answer | None = None
        #: Time at which the pending call counts as a failure, or as a further one.
        self._counts_at = math.inf
        self._is_late = False
        self._was_paused = False
        self._shift = phase * probe.period_s
        self._gap = probe.period_s

    @property
    def name(self) -> str:
        """The service's name and the method, as users write them."""
        return f"{self.service.rpartition('.')[2]}.{self.probe.method}"

    @property
    def next_at(self) -> float:
        """The time of the next action: a call, or giving up a pending one."""
        return self.due if self.call is None else self._counts_at

    def begin(self, now: float) -> None:
        """Start calling the probe; at once, unless it is a liveness probe."""
        if not math.isinf(self.due):
            return
        if self.probe.kind == "liveness":
            self.due, self._gap = now + self._shift, self.probe.period_s
        else:
            self.due, self._gap = now, self._shift

    def end(self) -> None:
        """Stop calling the probe; a pending call has no consequence."""
        self.due = self._counts_at = math.inf
        self._is_late = True

    def is_due(self, now: float) -> bool:
        """Return whether to call it; calls never overlap, even if one hangs."""
        return self.call is None and now >= self.due

    def called(self, call: int, now: float) -> None:
        """Record that the call of this number was ordered."""
        self.call, self._is_late, self._was_paused = call, False, False
        self._counts_at = now + self.probe.timeout_s
        self.due, self._gap = now + self._gap, self.probe.period_s

    def answered(self, answer: Answer) -> Consequence:
        """Process an answer; that of a call that was given up has no consequence."""
        self.call = None
        if self._is_late:
            return Consequence.NOTHING
        if answer.seconds > self.probe.timeout_s:
            # The child gave it up, or the parent was delayed and has not counted it.
            answer = self._too_late(answer.seconds)
        return self._note(answer)

    def give_up(self, now: float) -> Consequence:
        """Count a pending call as a failure: at its timeout, then once per period."""
        self._is_late = True
        self._counts_at = now + self.probe.period_s
        return self._note(self._too_late(self.probe.timeout_s))

    def pause(self, seconds: float) -> None:
        """Extend a pending call, once, by the time in which the parent could not read."""
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
        phase: a value from 0 to 1, different for each replica, which spreads the calls.
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
        return all(check.has_passed for check in self if check.probe.kind == "startup")

    @property
    def unready(self) -> set[str]:
        """The services with a readiness probe that fails, or has not passed yet."""
        return {
            check.service
            for check in self
            if check.probe.kind == "readiness" and (check.is_failing or not check.has_passed)
        }

    def start(self, now: float) -> None:
        for check in self:
            if check.probe.kind == "startup" and not check.has_passed:
                check.begin(now)

    def serve(self, now: float) -> bool:
        """Start calling liveness and readiness probes; return whether this is the first time."""
        if self._serves:
            return False
        self._serves = True
        for check in self:
            if check.probe.kind != "startup":
                check.begin(now)
        return True

    def drain(self) -> None:
        """Call only liveness probes, because a long drain must not hang unnoticed."""
        for check in self:
            if check.probe.kind != "liveness":
                check.end()

    def end(self) -> None:
        for check in self:
            check.end()

    def due(self, now: float) -> list[Check]:
        return [check for check in self if check.is_due(now)]

    def find(self, call: int) -> Check | None:
        return next((check for check in self if check.call == call), None)

    def overdue(self, now: float) -> list[tuple[Check, Consequence]]:
        """Count overdue calls as failures; return their probes and the consequences."""
        if self._looked is not None and now - self._looked > _PAUSE:
            for check in self:
                check.pause(now - self._looked)
        self._looked = now
        called = [check for check in self if check.call is not None]
        return [(check, check.give_up(now)) for check in called if now >= check.next_at]
