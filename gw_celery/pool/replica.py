"""The replicas of a pool and the states of their children, in the parent; no clock, no I/O.

A replica is a numbered place that one child after another fills. A child passes STARTING ->
ENTERING -> PROBING -> BENCHMARKING -> READY <-> UNREADY -> DRAINING. A report proves each step, and
most steps have a deadline. When a child is gone, its replica waits for the backoff and starts the
next one.
"""

from __future__ import annotations

import enum
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gw_celery import conf
from gw_celery.gpus import devices
from gw_celery.protocol import snapshot

if TYPE_CHECKING:
    from gw_celery.pool.child_process import ChildProcess

logger = logging.getLogger(__name__)

#: Seconds in READY below which the end of a child counts as a failed start.
_STEADY = 1.0
#: Maximum number of doublings of the wait before the next child, from 1 s to 64 s.
_MOST_DOUBLINGS = 6
#: The same as ``_STEADY`` for a child that a liveness probe ended: its model must not load
#: endlessly.
_WELL = 64.0


class State(enum.Enum):
    """The state of a child, or of a replica without a child."""

    STARTING = "starting"
    ENTERING = "entering"
    #: The startup probes have not passed yet.
    PROBING = "probing"
    BENCHMARKING = "benchmarking"
    READY = "ready"
    #: Loaded and alive, but no service takes inputs now.
    UNREADY = "unready"
    DRAINING = "draining"
    #: The replica waits before it starts the next child.
    FAILED = "failed"
    STOPPED = "stopped"


class ChildState:
    """The state of one child as the parent sees it, and the deadline for the next state."""

    def __init__(self, settings: conf.Settings, now: float) -> None:
        self.settings = settings
        #: Time of the last heartbeat; ``None`` while it may be silent, because imports and loading
        #: hold the GIL.
        self.last_beat: float | None = None
        #: Time of becoming READY; ``None`` before.
        self.ready_at: float | None = None
        #: Seconds from the start of the process to the first READY; ``None`` before.
        self.start_up: float | None = None
        self.deadline: float | None = None
        self._began = now
        #: Time at which the drain began, or an input without a limit was last in the child.
        self._unlimited_at = now
        #: When the last limit of what it has held since then is reached.
        self._last_limit_at = now
        self._enter(State.STARTING, now, settings.boot_timeout)

    @property
    def is_ready(self) -> bool:
        return self.current is State.READY

    @property
    def is_up(self) -> bool:
        """Whether the child has loaded and is not draining."""
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
        """Return an idle child to BENCHMARKING."""
        if self.current is State.READY:
            self._enter(State.BENCHMARKING, now, self.settings.benchmark_timeout)

    def wants_inputs(self, now: float, wants: bool) -> None:
        """Record whether any service of a loaded child takes inputs."""
        if self.is_up and wants is not self.is_ready:
            self._enter(State.READY if wants else State.UNREADY, now, None)

    def beat(self, now: float) -> None:
        if self.last_beat is not None:
            self.last_beat = now

    def drain(self, now: float) -> None:
        """Start to drain. The deadline is the later of ``drain_timeout`` and the inputs' limits."""
        if self.current is not State.DRAINING:
            self._enter(State.DRAINING, now, None)
            self._unlimited_at = now

    @property
    def lingers(self) -> bool:
        """Whether an input without a limit has delayed the drain past ``drain_timeout``."""
        is_draining = self.current is State.DRAINING and self.deadline is None
        return is_draining and self._unlimited_at - self.since >= self.settings.drain_timeout

    def seconds_since_ready(self, now: float) -> float:
        """Return the seconds since the child last became READY; negative before."""
        return -1.0 if self.ready_at is None else now - self.ready_at

    def overdue(self, now: float, longest_left: float = 0.0) -> str | None:
        """Return why the child must be killed now, or ``None``; called about once a second.

        Args:
            now: the current time.
            longest_left: seconds until the last input reaches its limit; infinite without a limit.
        """
        deadline = self.deadline
        if self.current is State.DRAINING and deadline is None:
            limit_at = now + longest_left
            if math.isinf(limit_at):
                self._unlimited_at = now
            else:
                self._last_limit_at = limit_at = max(self._last_limit_at, limit_at)
            deadline = max(self._unlimited_at + self.settings.drain_timeout, limit_at)
        if deadline is not None and now >= deadline:
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


class Replica:
    """A numbered place for a child on fixed devices; it outlives its children."""

    def __init__(self, number: int, shown: Sequence[devices.Device] = ()) -> None:
        self.number = number
        #: The devices that each child of this replica gets.
        self.devices = shown
        self._tokens = tuple(device.token for device in shown)
        self.child: ChildProcess | None = None
        #: A child that loads while ``child`` serves, and then replaces it.
        self.successor: ChildProcess | None = None
        self.restarts = 0
        self.last_error = ""
        self.is_wanted = True
        #: An operator drained it: no child starts until a restart.
        self.is_held = False
        #: An operator ordered a restart; by its number (``is_named``), it does not wait for the
        #: others.
        self.is_to_restart = False
        self.is_named = False
        #: Number of consecutive failed starts.
        self.failures = 0
        #: Earliest time of the next start.
        self.retry_at = 0.0

    @property
    def should_run(self) -> bool:
        return self.is_wanted and not self.is_held

    @property
    def state(self) -> State:
        if self.child is not None:
            return self.child.state.current
        if not self.should_run:
            return State.STOPPED
        # After a child that served or was told to leave, the next one starts within a second.
        return State.FAILED if self.failures else State.STARTING

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY

    def start_failed(self, now: float) -> float:
        """Count a failed start, and return the seconds to wait before the next."""
        wait = 2.0 ** min(self.failures, _MOST_DOUBLINGS)
        self.failures += 1
        self.retry_at = now + wait
        return wait

    def child_ended(
        self, child: ChildProcess, reason: str, now: float, *, is_expected: bool
    ) -> None:
        """Record the end of a child: log the reason, and set the time of the next start."""
        if self.child is child:
            self.child = None
        if self.successor is child:
            self.successor = None
        wait = 0.0
        if is_expected or _was_started_well(child, now):
            self.failures, self.retry_at = 0, now
        else:
            wait = self.start_failed(now)
        if is_expected:
            return
        self.restarts += 1
        self.last_error = child.reason or reason
        logger.error(
            "%r ended while %s, with %d inputs in flight: %s; the next child starts in %.0f s",
            child,
            child.state.current.value,
            len(child.requests),
            self.last_error.rstrip("."),
            wait,
        )

    def as_snapshot(self, slots: int, now: float) -> snapshot.Replica:
        child = self.child
        if child is None:
            return snapshot.Replica(
                number=self.number,
                state=self.state.value,
                devices=self._tokens,
                restarts=self.restarts,
                last_error=self.last_error,
                retry_in=max(0.0, self.retry_at - now),
            )
        return snapshot.Replica(
            number=self.number,
            state=self.state.value,
            devices=self._tokens,
            restarts=self.restarts,
            last_error=self.last_error,
            pid=child.pid,
            slots=slots,
            in_flight=len(child.requests),
            seconds_in_state=now - child.state.since,
            start_up=child.state.start_up,
            lag=child.lag,
            resident_bytes=child.resident_bytes,
            unready=tuple(sorted(child.slots.unready)),
            probes=tuple(
                snapshot.Probe(
                    name=check.name,
                    kind=check.probe.kind,
                    is_ok=None if check.last is None else check.last.is_ok,
                    failures=check.failures,
                    is_failing=check.is_failing,
                    detail="" if check.last is None else check.last.detail,
                    seconds=0.0 if check.last is None else check.last.seconds,
                )
                for check in child.checks or ()
            ),
        )


class ReplicaSet:
    """All replicas of a worker, including those that drain for good."""

    def __init__(self, shares: Sequence[Sequence[devices.Device]] | None) -> None:
        self._shares = shares
        self._wanted = 0
        self._replicas: dict[int, Replica] = {}
        #: An operator drained all replicas: new ones stay stopped too, until all are restarted.
        self._is_held = False

    def __iter__(self) -> Iterator[Replica]:
        return iter([replica for _, replica in sorted(self._replicas.items())])

    def resize(self, wanted: int) -> list[Replica]:
        """Set the number of replicas, and return those to drain: idle and least loaded ones first.

        ``complete`` adds the others, as soon as their devices are free.
        """
        self._wanted = wanted
        present = [replica for replica in self if replica.is_wanted]
        self.complete()
        surplus = sorted(present, key=_load)[: max(0, len(present) - wanted)]
        for replica in surplus:
            replica.is_wanted = False
        return surplus

    def remove(self, replica: Replica) -> None:
        self._replicas.pop(replica.number, None)

    def complete(self) -> None:
        missing = self._wanted - sum(replica.is_wanted for replica in self)
        # The number of a replica selects its devices: take the lowest free ones.
        numbers = itertools.count() if self._shares is None else iter(range(len(self._shares)))
        free = (number for number in numbers if number not in self._replicas)
        for number in list(itertools.islice(free, max(0, missing))):
            replica = Replica(number, () if self._shares is None else self._shares[number])
            replica.is_held = self._is_held
            self._replicas[number] = replica

    def hold(self, number: int | None) -> list[Replica]:
        """Return the replicas to drain (one or all), which stay stopped until a restart."""
        self._is_held = self._is_held or number is None
        held = [replica for replica in self if number in (None, replica.number)]
        for replica in held:
            replica.is_held = True
        return held

    def restart(self, number: int | None) -> None:
        """Mark one replica, or all in turn, for a restart; see ``next_to_restart``.

        A replica that the operator names does not wait for the others, which may never be ready.
        """
        self._is_held = self._is_held and number is not None
        for replica in self:
            if number in (None, replica.number) and replica.is_wanted:
                replica.is_held = False
                replica.is_to_restart = True
                replica.is_named = replica.is_named or number is not None

    def next_to_restart(self) -> Replica | None:
        """Return a replica to drain now, so that only one at a time is out of service."""
        for replica in self:
            # A new child is as good as a restarted one; a successor may be older than the order.
            if replica.child is None and replica.successor is None:
                replica.is_to_restart = replica.is_named = False
        queued = [replica for replica in self if replica.is_to_restart]
        queued.sort(key=lambda replica: not replica.is_named)
        # An UNREADY replica first: it serves nothing that would be missed.
        chosen = next((replica for replica in queued if replica.state is State.UNREADY), None)
        if chosen is None and queued and queued[0].is_ready:
            others = [other for other in self if other is not queued[0] and other.should_run]
            if queued[0].is_named or all(other.is_ready for other in others):
                chosen = queued[0]
        if chosen is not None:
            chosen.is_to_restart = chosen.is_named = False
        return chosen


def _was_started_well(child: ChildProcess, now: float) -> bool:
    """Return whether an unexpected end of a child does not count as a failed start."""
    if child.is_ill:
        return child.state.seconds_since_ready(now) >= _WELL and not child.is_unfit
    # A child that an input killed had started well.
    has_begun_one = any(held.accepted_at is not None for held in child.requests.values())
    return has_begun_one or child.state.seconds_since_ready(now) >= _STEADY


def _load(replica: Replica) -> tuple[bool, int, int]:
    """Sort key for shrinking: not serving first, then least loaded, then highest number."""
    held = len(replica.child.requests) if replica.child is not None else 0
    return (replica.is_ready, held, -replica.number)
