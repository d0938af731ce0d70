"""The replicas of a pool: numbered places, each filled by one child after the other."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
from collections.abc import Container, Iterator, Mapping, Sequence

from gw_celery import conf
from gw_celery.declare import probes
from gw_celery.gpus import allocation, devices
from gw_celery.policy import probes as policy_probes
from gw_celery.pool import child_state
from gw_celery.pool.child_process import ChildProcess
from gw_celery.protocol import snapshot

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What every child of a pool gets, and how many inputs it takes."""

    settings: conf.Settings
    #: Inputs in flight of each service in one replica; ``services.PLAIN`` for other tasks.
    slots: Mapping[str, int]
    #: The first frame of a child, but for its number.
    first: dict[str, object]
    #: The tasks of each service that have a benchmark.
    benchmarked: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    #: The devices of each replica; ``None`` where none needs any.
    allotment: allocation.Allotment | None = None
    #: The probes of what it serves, each with the key of its service.
    probes: Sequence[tuple[str, probes.Probe]] = ()
    max_tasks: int | None = None
    #: Resident bytes after which a child is replaced.
    max_bytes: int | None = None

    @property
    def slots_per_replica(self) -> int:
        return sum(self.slots.values())

    def is_worn(self, child: ChildProcess) -> bool:
        """Whether a child served, or holds, as much as it may."""
        has_served = self.max_tasks is not None and child.served >= self.max_tasks
        return has_served or (self.max_bytes is not None and child.resident_bytes > self.max_bytes)


class Replica:
    """A numbered place for a child on some devices; it outlives its children."""

    def __init__(self, number: int, shown: Sequence[devices.Device] = ()) -> None:
        self.number = number
        #: The devices of all its children, one after the other.
        self.devices = shown
        self._tokens = tuple(device.token for device in shown)
        self.child: ChildProcess | None = None
        #: Loads while ``child`` still serves, and takes its place.
        self.successor: ChildProcess | None = None
        self.backoff = child_state.Backoff()
        self.restarts = 0
        self.last_error = ""
        self.is_wanted = True
        #: Drained by an operator: no child is started until it is restarted.
        self.is_held = False

    @property
    def should_run(self) -> bool:
        return self.is_wanted and not self.is_held

    @property
    def is_ready(self) -> bool:
        return self.child is not None and self.child.state.is_ready

    @property
    def is_up(self) -> bool:
        """Whether its child has loaded and is not being drained, ready for inputs or not."""
        return self.child is not None and self.child.state.is_up

    def child_ended(
        self, child: ChildProcess, reason: str, now: float, *, is_expected: bool
    ) -> None:
        """The child is gone: say why, and when the next one may start."""
        if self.child is child:
            self.child = None
        if self.successor is child:
            self.successor = None
        if is_expected:
            self.backoff.succeeded(now)
            return
        self.restarts += 1
        self.last_error = child.reason or reason
        wait = 0.0
        if _was_started_well(child, now):
            self.backoff.succeeded(now)
        else:
            wait = self.backoff.failed(now)
        logger.error(
            "%r ended while %s, with %d inputs in flight: %s; the next child starts in %.0f s",
            child,
            child.state.current.value,
            len(child.requests),
            self.last_error,
            wait,
        )

    def as_snapshot(self, slots: int, now: float) -> snapshot.Replica:
        child = self.child
        if child is None:
            return snapshot.Replica(
                number=self.number,
                state=self._state_without_child().value,
                devices=self._tokens,
                restarts=self.restarts,
                last_error=self.last_error,
                retry_in=max(0.0, self.backoff.retry_at - now),
            )
        return snapshot.Replica(
            number=self.number,
            state=child.state.current.value,
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
            probes=tuple(map(_probe, child.checks or ())),
        )

    def _state_without_child(self) -> child_state.State:
        if not self.should_run:
            return child_state.State.STOPPED
        # After a child that served, or was told to leave, the next one starts within a second.
        return child_state.State.FAILED if self.backoff.failures else child_state.State.STARTING


class ReplicaSet:
    """All replicas of a worker, those that are being drained for good among them."""

    def __init__(self, shares: Sequence[Sequence[devices.Device]] | None) -> None:
        self._shares = shares
        self._wanted = 0
        self._replicas: dict[int, Replica] = {}
        self._restarting: collections.deque[int] = collections.deque()
        self._named: set[int] = set()
        #: All were drained by an operator: so is what is added, until all are restarted.
        self._is_held = False

    def __iter__(self) -> Iterator[Replica]:
        return iter([replica for _, replica in sorted(self._replicas.items())])

    def resize(self, wanted: int) -> list[Replica]:
        """Have ``wanted`` replicas; returns those to drain, the idle and least loaded first.

        One whose devices another still drains on is added by ``complete``.
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
        """Add the replicas that are wanted, as far as there are devices for them now."""
        shares = self._shares
        most = None if shares is None else len(shares)
        missing = self._wanted - sum(replica.is_wanted for replica in self)
        for number in _free_numbers(self._replicas, missing, most):
            replica = Replica(number, () if shares is None else shares[number])
            replica.is_held = self._is_held
            self._replicas[number] = replica

    def hold(self, number: int | None) -> list[Replica]:
        """Return the replicas to drain, one or all; they stay stopped until a restart."""
        self._is_held = self._is_held or number is None
        held = [replica for replica in self if number in (None, replica.number)]
        for replica in held:
            replica.is_held = True
        return held

    def restart(self, number: int | None) -> None:
        """Have one replica, or all one after the other, restarted; see ``next_to_restart``.

        One that is named does not wait for the others, which may never be ready.
        """
        self._named |= {number} if number is not None else set()
        self._is_held = self._is_held and number is not None
        for replica in self:
            if number in (None, replica.number) and replica.is_wanted:
                replica.is_held = False
                if replica.number not in self._restarting:
                    add = self._restarting.append if number is None else self._restarting.appendleft
                    add(replica.number)

    def next_to_restart(self) -> Replica | None:
        """Return a replica to drain now: when all others are ready, so that one goes at a time."""
        while self._restarting:
            replica = self._replicas.get(self._restarting[0])
            if replica is not None and replica.child is not None:
                break
            self._restarting.popleft()  # a new child is as good as a restarted one
        else:
            return None
        for number in self._restarting:
            queued = self._replicas.get(number)
            if queued is not None and queued.is_up and not queued.is_ready:
                return self._taken_to_restart(queued)  # nothing that it serves would miss it
        others = [other for other in self if other is not replica and other.should_run]
        is_named = replica.number in self._named
        if replica.is_ready and (is_named or all(other.is_ready for other in others)):
            return self._taken_to_restart(replica)
        return None

    def _taken_to_restart(self, replica: Replica) -> Replica:
        self._restarting.remove(replica.number)
        self._named.discard(replica.number)
        return replica


def _was_started_well(child: ChildProcess, now: float) -> bool:
    """Whether the end of a child that should have gone on is no fault of its start."""
    if child.is_ill:
        return child.state.was_well(now) and not child.is_unfit
    # One that dies of an input was started well.
    has_begun_one = any(held.accepted_at is not None for held in child.requests.values())
    return has_begun_one or child.state.was_steady(now)


def _probe(check: policy_probes.Check) -> snapshot.Probe:
    last = check.last
    return snapshot.Probe(
        name=check.name,
        kind=check.probe.kind,
        is_ok=None if last is None else last.is_ok,
        failures=check.failures,
        is_failing=check.is_failing,
        detail="" if last is None else last.detail,
        seconds=0.0 if last is None else last.seconds,
    )


def _load(replica: Replica) -> tuple[bool, int, int]:
    """Order for shrinking: what serves nothing, then the least loaded, the highest number first."""
    held = len(replica.child.requests) if replica.child is not None else 0
    return (replica.is_ready, held, -replica.number)


def _free_numbers(taken: Container[int], count: int, most: int | None) -> list[int]:
    """The lowest numbers below ``most`` that are not taken: a number stands for its devices."""
    numbers = itertools.count() if most is None else iter(range(most))
    free = (number for number in numbers if number not in taken)
    return list(itertools.islice(free, max(0, count)))
