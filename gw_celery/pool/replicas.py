"""Keeps every replica filled with a child: how they start, take over, drain and end."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator

from gw_celery.pool import child_process, child_state, request, sockets
from gw_celery.pool import replica as pool_replica
from gw_celery.protocol import frames, snapshot

logger = logging.getLogger(__name__)

#: Grace of a child that was told to leave, over the bounds of its exit hooks.
_LEAVE_MARGIN = 10.0
#: Inputs that one line of the log names.
_NAMED = 5
_LINGERS = (
    "%r has been draining for %.0f s: it waits for inputs that have no time limit, %s. End one "
    "with `celery control terminate SIGTERM ID`; give them a limit (timeout=, time_limit=)"
)
_NOT_NEEDED = "Worker exited prematurely: it was not needed any more."


class Replicas:
    """The replicas of a worker and the children that fill them.

    Args:
        setup: what every child gets.
        followed: the sockets that are listened to.
        longest_left: seconds until the last limit of what a child holds.
        on_gone: told which child is gone, and why, to settle what it held.
        on_capacity: called when there are more, or fewer, slots.
    """

    def __init__(
        self,
        setup: pool_replica.Setup,
        followed: sockets.Sockets,
        longest_left: Callable[[child_process.Child, float], float],
        on_gone: Callable[[child_process.Child, str], None],
        on_capacity: Callable[[], None],
    ) -> None:
        self._setup = setup
        self._sockets = followed
        self._longest_left = longest_left
        self._on_gone = on_gone
        self._on_capacity = on_capacity
        self._places = pool_replica.Places(setup.shares)
        #: Every live child and the replica that it fills, filled, or will fill.
        self._children: dict[child_process.Child, pool_replica.Place] = {}
        #: Processes that are ended, or about to end, and not reaped.
        self._dying: list[subprocess.Popen[bytes]] = []
        self._deadlines = child_state.Deadlines.of(setup.settings)
        #: No child is started any more.
        self.is_closing = False

    def __iter__(self) -> Iterator[child_process.Child]:
        """Yield every live child; they may start and end meanwhile."""
        return iter(list(self._children))

    def __contains__(self, child: object) -> bool:
        return child in self._children

    def __len__(self) -> int:
        return len(self._children)

    def seen(self) -> tuple[snapshot.Replica, ...]:
        """Return the picture of every replica that operators see."""
        slots, now = self._setup.slots_per_replica, request.now()
        return tuple(place.seen(slots, now) for place in self._places)

    # -- what is wanted --

    def resize(self, wanted: int) -> None:
        """Grow to, or shrink by draining to, this number of replicas."""
        self._drain_all(self._places.resize(wanted))

    def restart(self, number: int | None) -> None:
        """Replace the child of one replica, or of all, one after the other, by draining."""
        self._places.restart(number)

    def hold(self, number: int | None) -> None:
        """Drain one replica, or all, and start no child there until ``restart``."""
        self._drain_all(self._places.hold(number))

    def tick(self, now: float) -> None:
        """Drain what is to restart, and start what is missing; once a second."""
        self._dying = child_process.reap(self._dying)
        if (place := self._places.next_to_restart()) is not None:
            self.drain(place.child)
        self._places.complete()
        for place in self._places:
            self._fill(place, now)
            self._relieve(place)
        for child in self._children:
            # None is unlimited while the one that was is being stopped.
            is_due = child.life.lingers(now) and not child.has_told
            if is_due and (names := _unlimited(child)):
                child.has_told = True
                logger.warning(_LINGERS, child, now - child.life.since, names)

    # -- one child --

    def became_ready(self, child: child_process.Child, now: float) -> None:
        """The child has proved all that stands before READY: it takes its place."""
        child.life.measured(now)
        place = self._children[child]
        place.last_error = ""
        if place.successor is child:
            place.successor, predecessor = None, place.child
            place.child = child
            self.drain(predecessor)
        if not place.should_run or self.is_closing:
            self.drain(child)
        logger.info("%r is ready", child)
        self._on_capacity()

    def drain(self, child: child_process.Child | None) -> None:
        """Give the child nothing new, and let it leave when it holds nothing."""
        if child is None or child not in self._children:
            return
        state, now = child.life.state, request.now()
        if state is child_state.State.STARTING:
            self.end(child, _NOT_NEEDED)
        elif state is not child_state.State.DRAINING:
            child.life.drain(now, self._longest_left(child, now))
            child.send((frames.Order.DRAIN,))
            self._sockets.watch(child)
            self.leave_when_idle(child)
            self._on_capacity()

    def leave_when_idle(self, child: child_process.Child) -> None:
        """Let a draining child leave once nothing in it is unanswered."""
        unanswered = [job for job in child.jobs.values() if not job.is_answered]
        if unanswered or child.is_leaving:
            now = request.now()
            child.life.ended(now, self._longest_left(child, now))
            return
        if child.jobs:  # what is left was stopped and does not go
            self.end(child, "Worker exited prematurely: it could not stop an input.")
            return
        child.is_leaving = True
        child.life.deadline = request.now() + 2 * self._setup.settings.exit_timeout + _LEAVE_MARGIN
        child.send((frames.Order.LEAVE,))
        self._sockets.watch(child)

    def refuse(self, child: child_process.Child, reason: str) -> None:
        """Let a child that cannot serve leave, as one whose start failed."""
        logger.error("%r is not ready: %s", child, reason)
        child.reason = reason
        child.life.deadline = request.now() + 2 * self._setup.settings.exit_timeout + _LEAVE_MARGIN
        child.send((frames.Order.LEAVE,))
        self._sockets.watch(child)

    def replace(self, child: child_process.Child) -> None:
        """Start a successor, which takes over when it is ready; the child serves until then."""
        if child not in self._children:
            return
        if child.life.state is child_state.State.DRAINING:
            self.leave_when_idle(child)  # what is stuck in it may be all that it still holds
            return
        child.must_go = True
        place, now = self._children[child], request.now()
        is_due = place.child is child and place.successor is None
        if is_due and self._may_start(place, now):
            place.successor = self._start(place, now)

    def end(self, child: child_process.Child, reason: str | None) -> None:
        """The child is gone, or killed for ``reason``: free its place, and say so."""
        if child not in self._children:
            return
        place = self._children.pop(child)
        self._sockets.remove(child)
        if reason is not None:
            child.kill()
        code = child.close()
        if code is None:
            child.kill()
            self._dying.append(child.process)
        why = reason or child_process.describe_exit(code)
        is_expected = child.is_leaving or self.is_closing or not place.should_run
        place.ended(child, why, request.now(), is_expected=is_expected)
        self._on_gone(child, why)

    # -- places --

    def _drain_all(self, drained: list[pool_replica.Place]) -> None:
        for place in drained:
            self.drain(place.child)
            self.drain(place.successor)

    def _start(self, place: pool_replica.Place, now: float) -> child_process.Child | None:
        life = child_state.Life(deadlines=self._deadlines, now=now)
        try:
            child = child_process.Child(place.number, life, self._setup.slots, place.share)
        except OSError as exc:
            wait = place.backoff.failed(now)
            place.last_error = f"cannot start a process: {exc}"
            logger.error("replica %d %s; next try in %.0f s", place.number, place.last_error, wait)
            return None
        self._children[child] = place
        self._sockets.add(child)
        child.send_first(self._setup.first | {"number": place.number})
        self._sockets.watch(child)
        return child

    def _fill(self, place: pool_replica.Place, now: float) -> None:
        if place.child is not None:
            return
        if not place.is_wanted:
            self._places.remove(place)
        elif place.successor is not None:
            place.child, place.successor = place.successor, None
        elif self._may_start(place, now):
            place.child = self._start(place, now)

    def _may_start(self, place: pool_replica.Place, now: float) -> bool:
        return place.should_run and not self.is_closing and now >= place.backoff.retry_at

    def _relieve(self, place: pool_replica.Place) -> None:
        """See to it that a child goes that must: without a successor where none can load."""
        child = place.child
        if child is None or not (child.must_go and child.life.is_up) or place.successor:
            return
        if place.backoff.failures:  # memory for one copy only, for example
            self.drain(child)
        else:
            self.replace(child)


def _unlimited(child: child_process.Child) -> str:
    """Names of the inputs that a child holds and nothing ends; the first of them."""
    found = [job for job in child.jobs.values() if not job.is_answered and not job.hard_limit]
    return ", ".join(f"{job.name}[{job.task_id}]" for job in found[:_NAMED])
