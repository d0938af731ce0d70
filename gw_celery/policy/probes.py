"""The probes of one child: when each is called, what counts as failed, and what follows.

Pure: ``now`` is an argument. Everything is timed here, outside of the child: one that cannot answer
any more cannot time itself either.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator, Sequence

from gw_celery.declare import probes

#: A parent that was away for longer could not have read an answer.
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
    #: It passed again, or for the first time.
    READY = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one call of a probe gave."""

    is_ok: bool
    #: Why, in a few words.
    detail: str
    #: How long the call took, by the child's clock.
    seconds: float


class Check:
    """One probe of one service in one child."""

    def __init__(self, service: str, probe: probes.Probe, phase: float = 1.0) -> None:
        self.service = service
        self.probe = probe
        #: The part of a period by which its calls are shifted against those of other replicas.
        self.phase = phase
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
        if math.isinf(self.due):
            shift = self.phase * self.probe.period_s
            waits = self.probe.kind == "liveness"
            self.due = now + shift if waits else now
            self._gap = self.probe.period_s if waits else shift

    def end(self) -> None:
        """Call it no more; what is on its way has no consequence."""
        self.due = self._counts_at = math.inf
        self._is_late = True

    def is_due(self, now: float) -> bool:
        """Whether to call it: never while the last call hangs, or calls would pile up."""
        return self.call is None and now >= self.due

    def called(self, call: int, now: float) -> None:
        """It is being called, for the first time or again."""
        self.call, self._is_late, self._was_paused = call, False, False
        self._counts_at = now + self.probe.timeout_s
        self.due, self._gap = now + self._gap, self.probe.period_s

    def answered(self, answer: Answer) -> Consequence:
        """Its call came to an end; one that was given up counts no more."""
        self.call = None
        if self._is_late:
            return Consequence.NOTHING
        if answer.seconds > self.probe.timeout_s:
            # The child gave it up, or the parent was away and has not counted it.
            answer = dataclasses.replace(answer, is_ok=False, detail=self._too_late())
        return self._note(answer)

    def is_overdue(self, now: float) -> bool:
        """Whether the call on its way counts as a failure now, or as another one."""
        return self.call is not None and now >= self._counts_at

    def give_up(self, now: float) -> Consequence:
        """Count a call without an answer: at its time-out, and once a period while it hangs."""
        self._is_late = True
        self._counts_at = now + self.probe.period_s
        seconds = self.probe.timeout_s
        return self._note(Answer(is_ok=False, detail=self._too_late(), seconds=seconds))

    def pause(self, seconds: float) -> None:
        """Give a call the time back, once, in which nobody could have heard its answer."""
        if not self._was_paused:
            self._was_paused = True
            self._counts_at += seconds

    def _too_late(self) -> str:
        return f"no answer within {self.probe.timeout_s:g} s"

    def _note(self, answer: Answer) -> Consequence:
        self.last = answer
        return self._passed() if answer.is_ok else self._failed()

    def _passed(self) -> Consequence:
        is_news = self.is_failing or not self.has_passed
        self.has_passed, self.is_failing, self.failures = True, False, 0
        if self.probe.kind == "startup":
            self.due = math.inf
            return Consequence.STARTED
        is_ready = self.probe.kind == "readiness" and is_news
        return Consequence.READY if is_ready else Consequence.NOTHING

    def _failed(self) -> Consequence:
        self.failures += 1
        if self.is_failing or self.failures < self.probe.failures:
            return Consequence.NOTHING
        self.is_failing = True
        return _WHEN_FAILING[self.probe.kind]


_WHEN_FAILING = {
    "startup": Consequence.CANNOT_START,
    "liveness": Consequence.REPLACE,
    "readiness": Consequence.NOT_READY,
}


class Checks:
    """All probes of one child.

    Args:
        declared: each probe with the key of its service.
        phase: from 0 to 1, another one for each replica, so that they are not all called at once.
    """

    def __init__(self, declared: Sequence[tuple[str, probes.Probe]], phase: float = 1.0) -> None:
        self._all = [Check(service, probe, phase) for service, probe in declared]
        self._looked: float | None = None
        self._serves = False

    def __iter__(self) -> Iterator[Check]:
        return iter(self._all)

    @property
    def next_at(self) -> float:
        return min((check.next_at for check in self._all), default=math.inf)

    @property
    def have_started(self) -> bool:
        """Whether every startup probe has passed."""
        return all(check.has_passed for check in self._all if check.probe.kind == "startup")

    @property
    def unready(self) -> set[str]:
        """The services that want no inputs: a readiness probe is failing, or never passed."""
        return {
            check.service
            for check in self._all
            if check.probe.kind == "readiness" and (check.is_failing or not check.has_passed)
        }

    def start(self, now: float) -> None:
        """Call the startup probes from now on."""
        for check in self._all:
            if check.probe.kind == "startup" and not check.has_passed:
                check.begin(now)

    def serve(self, now: float) -> bool:
        """Call the liveness and readiness probes from now on; whether that is news."""
        is_news, self._serves = not self._serves, True
        if is_news:
            for check in self._all:
                if check.probe.kind != "startup":
                    check.begin(now)
        return is_news

    def drain(self) -> None:
        """Call the liveness probes alone: what drains for long must not hang meanwhile."""
        self._end(check for check in self._all if check.probe.kind != "liveness")

    def end(self) -> None:
        """Call nothing any more."""
        self._end(self._all)

    def _end(self, ended: Iterable[Check]) -> None:
        for check in ended:
            check.end()

    def due(self, now: float) -> list[Check]:
        """Return what is to be called now."""
        return [check for check in self._all if check.is_due(now)]

    def find(self, call: int) -> Check | None:
        """Return the probe that is being called with this number."""
        return next((check for check in self._all if check.call == call), None)

    def overdue(self, now: float) -> list[tuple[Check, Consequence]]:
        """Count what has no answer in time; returns each that was counted, and what follows."""
        if self._looked is not None and now - self._looked > _PAUSE:
            for check in self._all:
                check.pause(now - self._looked)
        self._looked = now
        late = [check for check in self._all if check.is_overdue(now)]
        return [(check, check.give_up(now)) for check in late]
