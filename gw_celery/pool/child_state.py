"""The state of one child, as its parent sees it: a state machine without clock or I/O.

STARTING -> ENTERING -> PROBING -> BENCHMARKING -> READY <-> UNREADY -> DRAINING -> gone. The child
proves each step by a report; each step has a deadline. A replica whose child is gone waits its
backoff and starts another.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from gw_celery import conf
from gw_celery.policy import backoff

#: A child that was ready for less is as bad as one that never was.
_STEADY = 1.0
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 64.0
#: One that fell ill in less may do so each time: it must not load its model over and over.
_WELL = _LONGEST_WAIT


class State(enum.Enum):
    """What a child, or a replica without one, is doing."""

    STARTING = "starting"
    ENTERING = "entering"
    #: Its startup probes have not passed yet.
    PROBING = "probing"
    BENCHMARKING = "benchmarking"
    READY = "ready"
    #: Loaded and alive, but none of its services wants inputs now.
    UNREADY = "unready"
    DRAINING = "draining"
    #: The replica waits before it starts another child.
    FAILED = "failed"
    STOPPED = "stopped"


@dataclasses.dataclass(kw_only=True)
class ChildState:
    """The state of one child and the time when it must have changed."""

    settings: conf.Settings
    now: dataclasses.InitVar[float]
    current: State = State.STARTING
    since: float = 0.0
    deadline: float | None = None
    #: When it last showed that its loop turns; ``None`` while it may be silent: imports and loads
    #: of weights hold the GIL.
    last_beat: float | None = None
    #: When it became READY; ``None`` before.
    ready_at: float | None = None
    #: Seconds from the start of its process until it was READY first; ``None`` before.
    start_up: float | None = None

    def __post_init__(self, now: float) -> None:
        self._began = now
        self._enter(State.STARTING, now, self.settings.boot_timeout)

    @property
    def is_ready(self) -> bool:
        return self.current is State.READY

    @property
    def is_up(self) -> bool:
        """Whether it has become READY and is not being drained."""
        return self.current in (State.READY, State.UNREADY)

    def loaded(self, now: float) -> None:
        if self.current is State.STARTING:
            self._enter(State.ENTERING, now, self.settings.start_timeout)

    def entered(self, now: float) -> None:
        if self.current is State.ENTERING:
            self._enter(State.PROBING, now, None)
            self.last_beat = now

    def probed(self, now: float) -> None:
        if self.current is State.PROBING:
            self._enter(State.BENCHMARKING, now, self.settings.benchmark_timeout)

    def measured(self, now: float) -> None:
        if self.current is State.BENCHMARKING:
            self._enter(State.READY, now, None)
            self.ready_at = now
            if self.start_up is None:
                self.start_up = now - self._began

    def measure_again(self, now: float) -> None:
        """Take nothing new until it has been measured; for one that holds nothing."""
        if self.current is State.READY:
            self._enter(State.BENCHMARKING, now, self.settings.benchmark_timeout)

    def wants_inputs(self, now: float, wants: bool) -> None:
        """Note that some service of a loaded child wants inputs, or none does."""
        if self.is_up and wants is not self.is_ready:
            self._enter(State.READY if wants else State.UNREADY, now, None)

    def beat(self, now: float) -> None:
        if self.last_beat is not None:
            self.last_beat = now

    def drain(self, now: float, longest_limit: float) -> None:
        """Take nothing new; what runs has until its own limit, or the drain's, has passed.

        Args:
            longest_limit: seconds that the last input may run; infinite where one has no limit.
        """
        if self.current is not State.DRAINING:
            bound = max(self.settings.drain_timeout, longest_limit)
            self._enter(State.DRAINING, now, None if math.isinf(bound) else bound)

    def began(self, now: float, limit: float) -> None:
        """An input that waited in a draining child has begun: it may run for ``limit`` seconds."""
        if self.current is State.DRAINING and self.deadline is not None:
            self.deadline = None if math.isinf(limit) else max(self.deadline, now + limit)

    def ended(self, now: float, longest_limit: float) -> None:
        """An input of a draining child has ended: what is left is bound, if nothing unlimited is.

        Args:
            longest_limit: seconds that the last of the others may run.
        """
        if (
            self.current is State.DRAINING
            and self.deadline is None
            and math.isfinite(longest_limit)
        ):
            self.deadline = now + max(self.settings.drain_timeout, longest_limit)

    def lingers(self, now: float) -> bool:
        """Whether it has been draining for long because of what has no limit."""
        is_bound = self.current is not State.DRAINING or self.deadline is not None
        return not is_bound and now - self.since >= self.settings.drain_timeout

    def was_steady(self, now: float) -> bool:
        """Whether the child served long enough for its end to be no fault of its start."""
        return self.ready_at is not None and now - self.ready_at >= _STEADY

    def was_well(self, now: float) -> bool:
        """Whether the child served long enough for its illness to be no fault of its start."""
        return self.ready_at is not None and now - self.ready_at >= _WELL

    def overdue(self, now: float) -> str | None:
        """Return why the child must be killed now, if it must."""
        if self.deadline is not None and now >= self.deadline:
            return f"was {self.current.value} for {now - self.since:.0f} s{_SETTINGS[self.current]}"
        if self.last_beat is not None and now - self.last_beat >= self.settings.heartbeat_timeout:
            return (
                f"sent no heartbeat for {now - self.last_beat:.0f} s: it is stopped, or a call "
                f"blocks its event loop or holds the GIL (setting gw_heartbeat_timeout)"
            )
        return None

    def _enter(self, state: State, now: float, timeout: float | None) -> None:
        self.current = state
        self.since = now
        self.deadline = None if timeout is None else now + timeout


_SETTINGS = {
    State.STARTING: " (setting gw_boot_timeout)",
    State.ENTERING: " (setting gw_start_timeout)",
    State.BENCHMARKING: " (setting gw_benchmark_timeout)",
    State.DRAINING: " (setting gw_drain_timeout)",
}


class Backoff:
    """When a replica may start its next child."""

    def __init__(self) -> None:
        self.failures = 0
        self.retry_at = 0.0
        self._waits = backoff.Backoff(_FIRST_WAIT, _LONGEST_WAIT)

    def failed(self, now: float) -> float:
        """Count a failed start and return the seconds to wait: 1, 2, 4 up to 64."""
        self.failures += 1
        wait = self._waits.next()
        self.retry_at = now + wait
        return wait

    def succeeded(self, now: float) -> None:
        self.failures = 0
        self.retry_at = now
        self._waits.reset()
