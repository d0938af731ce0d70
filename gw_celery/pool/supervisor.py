"""Keeps every replica filled with a child, and every input with one of them.

Everything here runs in one thread: the worker's event loop, or the pool's own where the transport
has none. It is driven by ``poll``, which reads what children report, and by ``tick``, which judges
deadlines after that.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Iterable
from typing import Any

from gw_celery import snapshot
from gw_celery.pool import children, deaths, inputs, jobs, places, replica, sockets, wire

logger = logging.getLogger(__name__)

#: Grace of a child that was told to leave, over the bounds of its exit hooks.
_LEAVE_MARGIN = 10.0
_STUCK = (
    "a batch of %s goes on with no input left in it: it is replaced (setting gw_cancel_timeout)"
)
_NOT_NEEDED = "Worker exited prematurely: it was not needed any more."


class Supervisor:
    """Replicas, their children, and the inputs that they hold."""

    def __init__(
        self,
        setup: places.Setup,
        on_capacity: Callable[[], None],
        connect_redis: Callable[[], Any] | None = None,
        bury: Callable[[jobs.Job, str, int], None] | None = None,
        on_lost: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._setup = setup
        shared = None if connect_redis is None else deaths.Shared(connect_redis, self.wake)
        self._inputs = inputs.Inputs(setup.settings, self._after_input, self._replace, shared, bury)
        self._on_capacity = on_capacity
        #: Told the numbers of inputs that began in a child that died.
        self._on_lost = on_lost
        self._places = places.Places(setup.shares)
        #: Every live child and the replica that it fills, filled, or will fill.
        self._children: dict[children.Child, places.Place] = {}
        #: Processes that are ended, or about to end, and not reaped.
        self._dying: list[subprocess.Popen[bytes]] = []
        self._sockets = sockets.Sockets()
        # Reentrant: Celery's signal handlers call us in the middle of anything.
        self._lock = threading.RLock()
        #: Inputs that found no slot the last time.
        self._waiting = 0
        self._is_closing = False
        self._deadlines = replica.Deadlines.of(setup.settings)

    # -- size --

    def resize(self, wanted: int) -> None:
        """Grow to, or shrink by draining to, this number of replicas."""
        with self._lock:
            self._drain_all(self._places.resize(wanted))
        self.wake()

    def restart(self, number: int | None) -> None:
        """Replace the child of one replica, or of all, one after the other, by draining."""
        with self._lock:
            self._places.restart(number)
        self.wake()

    def hold(self, number: int | None) -> None:
        """Drain one replica, or all, and start no child there until ``restart``."""
        with self._lock:
            self._drain_all(self._places.hold(number))
        self.wake()

    # -- inputs --

    def submit(self, args: tuple[Any, ...], service: str, options: dict[str, Any]) -> jobs.Job:
        """Take one input; it starts when a replica has a slot for it."""
        with self._lock:
            job = self._inputs.submit(args, service, options, self._stop)
            self._dispatch()
        return job

    def _stop(self, job: jobs.Job, signum: int) -> None:
        """Stop one input and answer it as terminated, before or after its start."""
        with self._lock:
            self._inputs.stop(job, signum)
            if job.child is not None:
                self._sockets.watch(job.child)

    def forget_waiting(self) -> None:
        """Drop what has not started: the broker delivers it again."""
        with self._lock:
            self._watch(self._inputs.forget_waiting())

    def withdraw(self) -> None:
        """Take out what was revoked or has expired while it gathered for a batch."""
        with self._lock:
            self._watch(self._inputs.withdraw())

    def in_flight(self) -> int:
        """Inputs that children hold and that are not answered."""
        return self._inputs.in_flight()

    def held(self) -> int:
        """Inputs that children have not let go of, answered or not."""
        return self._inputs.held()

    # -- the event loop --

    def fileno(self) -> int:
        """One descriptor that is readable when ``poll`` has something to do."""
        return self._sockets.fileno()

    def wake(self) -> None:
        """Make ``poll`` return; from any thread."""
        self._sockets.wake()

    def poll(self, timeout: float = 0.0) -> None:
        """Handle what children reported, waiting ``timeout`` seconds at most for it."""
        events = self._sockets.wait(timeout)
        with self._lock:
            for child in self._sockets.follow(events):
                self._receive(child)
            self._inputs.settle_asked(jobs.now())
            self._dispatch()
            self._inputs.expire(jobs.now())

    def tick(self) -> None:
        """Judge deadlines, reap, start what is missing; once a second, after ``poll``."""
        with self._lock:
            now = jobs.now()
            self._dying = children.reap(self._dying)
            for child in list(self._children):
                self._judge(child, now)
            if (place := self._places.next_to_restart()) is not None:
                self._drain(place.child)
            self._places.complete()
            for place in self._places:
                self._fill(place, now)
                self._relieve(place)
            self._dispatch()

    def next_deadline(self) -> float | None:
        """Seconds until an input reaches a limit; ``None`` without limits."""
        return self._inputs.limits.next_in(jobs.now())

    # -- the end --

    def close(self) -> None:
        """Take nothing new and start no child any more."""
        with self._lock:
            self._is_closing = True
            self._watch(self._inputs.forget_waiting())

    def abandon_unaccepted(self) -> None:
        """Give up what has not begun, unanswered, after a last look at what has."""
        with self._lock:
            self.poll()
            self._inputs.abandon_unaccepted()

    def leave(self) -> None:
        """Let every child run its exit hooks and end."""
        with self._lock:
            for child in list(self._children):
                self._drain(child)

    def is_empty(self) -> bool:
        return not self._children

    def kill(self, reason: str) -> None:
        """End every child now; what they hold goes back to the broker or fails with ``reason``."""
        with self._lock:
            self._is_closing = True
            for child in list(self._children):
                self._end(child, reason)

    def release(self) -> None:
        """Close what this object holds open; nothing may be called after it."""
        self._inputs.close()
        self._sockets.close()

    # -- what is seen from outside --

    def ready_by_service(self) -> dict[str, int]:
        """Slots of the replicas that are READY, by service."""
        ready = sum(one.life.is_ready for one in self._children)
        return {service: slots * ready for service, slots in self._setup.slots.items()}

    def outage(self) -> str:
        """Why a live child cannot store results; ``""`` while all can, as far as they know."""
        return next((one.outage for one in self._children if one.outage), "")

    def waiting(self) -> int:
        """Inputs that wait here because no slot is free."""
        return len(self._inputs.waiting)

    def backlog(self, service: str) -> int:
        """Inputs of a service that wait here because no slot is free."""
        return self._inputs.waiting.waiting(service)

    def replicas(self) -> tuple[snapshot.Replica, ...]:
        slots, now = self._setup.slots_per_replica, jobs.now()
        return tuple(place.seen(slots, now) for place in self._places)

    # -- reports --

    def _receive(self, child: children.Child) -> bool:
        """Handle what a child has reported; whether there was anything."""
        received = child.receive()
        garbage = received.garbage
        for report in received.reports:
            if child not in self._children:
                break
            try:
                self._handle(child, report)
            except wire.Garbage as exc:
                garbage = exc
                break
            except Exception:  # the others' answers must not be lost with it
                logger.exception("%r: its report %.100r could not be followed", child, report)
        if garbage is not None:
            logger.error("%r wrote garbage and is killed: %s", child, garbage)
            self._end(child, f"Worker exited prematurely: it wrote garbage ({garbage}).")
        elif received.is_closed:
            self._end(child, None)
        return bool(received.reports) and child in self._children

    def _handle(self, child: children.Child, report: list[Any]) -> None:
        kind, now = report[0], jobs.now()
        if kind == wire.Report.BEAT:
            child.life.beat(now)
            _, child.lag, child.resident_bytes = report
        elif kind == wire.Report.LOADED:
            child.life.loaded(now)
        elif kind == wire.Report.READY:
            self._became_ready(child, now)
        elif kind == wire.Report.STUCK:
            logger.error("%r has a batch of %s that nobody waits for: replaced", child, report[1])
            self._replace(child)
        elif kind == wire.Report.FAILED:
            child.reason = report[1]
        elif kind == wire.Report.OUTAGE:
            child.outage = report[1]
            self._on_capacity()
        else:
            self._inputs.handle(child, report, now)
            if kind == wire.Report.ERROR and report[3] == "builtins.MemoryError":
                logger.error("%r ran out of memory in a task: it is replaced", child)
                self._replace(child)

    def _after_input(self, child: children.Child) -> None:
        if child.life.state is replica.State.DRAINING:
            self._leave_when_idle(child)
        elif child.life.is_ready and self._setup.is_worn(child):
            self._replace(child)

    def _became_ready(self, child: children.Child, now: float) -> None:
        child.life.entered(now)
        place = self._children[child]
        place.last_error = ""
        if place.successor is child:
            place.successor, predecessor = None, place.child
            place.child = child
            self._drain(predecessor)
        if not place.should_run or self._is_closing:
            self._drain(child)
        logger.info("%r is ready", child)
        self._on_capacity()

    # -- children --

    def _dispatch(self) -> None:
        before = self._waiting
        if self._inputs.waiting and not self.outage():
            ready = [one for one in self._children if one.life.is_ready]
            self._watch(self._inputs.dispatch(ready))
        self._waiting = len(self._inputs.waiting)
        if self._waiting != before:
            self._on_capacity()

    def _watch(self, written: Iterable[children.Child]) -> None:
        for child in written:
            self._sockets.watch(child)

    def _start(self, place: places.Place, now: float) -> children.Child | None:
        life = replica.Life(deadlines=self._deadlines, now=now)
        try:
            child = children.Child(place.number, life, self._setup.slots, place.share)
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

    def _fill(self, place: places.Place, now: float) -> None:
        if place.child is not None:
            return
        if not place.is_wanted:
            self._places.remove(place)
        elif place.successor is not None:
            place.child, place.successor = place.successor, None
        elif self._may_start(place, now):
            place.child = self._start(place, now)

    def _may_start(self, place: places.Place, now: float) -> bool:
        return place.should_run and not self._is_closing and now >= place.backoff.retry_at

    def _judge(self, child: children.Child, now: float) -> None:
        if child.process.poll() is not None:
            while child in self._children and self._receive(child):
                pass  # what it wrote before it ended
            self._end(child, None)
        elif (reason := child.life.overdue(now)) is not None:
            logger.error("%r %s: it is killed", child, reason)
            child.reason = child.reason or reason
            self._end(child, f"Worker exited prematurely: it {reason}.")

    def _drain_all(self, drained: list[places.Place]) -> None:
        for place in drained:
            self._drain(place.child)
            self._drain(place.successor)

    def _drain(self, child: children.Child | None) -> None:
        """Give the child nothing new, and let it leave when it holds nothing."""
        if child is None or child not in self._children:
            return
        state, now = child.life.state, jobs.now()
        if state is replica.State.STARTING:
            self._end(child, _NOT_NEEDED)
        elif state is not replica.State.DRAINING:
            left = self._inputs.limits.longest_left(child.jobs.values(), now)
            child.life.drain(now, left)
            child.send((wire.Order.DRAIN,))
            self._sockets.watch(child)
            self._leave_when_idle(child)
            self._on_capacity()

    def _leave_when_idle(self, child: children.Child) -> None:
        unanswered = [job for job in child.jobs.values() if not job.is_answered]
        if unanswered or child.is_leaving:
            return
        if child.jobs:  # what is left was stopped and does not go
            self._end(child, "Worker exited prematurely: it could not stop an input.")
            return
        child.is_leaving = True
        child.life.deadline = jobs.now() + 2 * self._setup.settings.exit_timeout + _LEAVE_MARGIN
        child.send((wire.Order.LEAVE,))
        self._sockets.watch(child)

    def _replace(self, child: children.Child) -> None:
        """Start a successor, which takes over when it is ready; the child serves until then."""
        if child not in self._children:
            return
        child.must_go = True
        place, now = self._children[child], jobs.now()
        is_due = place.child is child and place.successor is None
        if is_due and self._may_start(place, now):
            place.successor = self._start(place, now)

    def _relieve(self, place: places.Place) -> None:
        """See to it that a child goes that must: without a successor where none can load."""
        child = place.child
        if child is None or not (child.must_go and child.life.is_ready) or place.successor:
            return
        if place.backoff.failures:  # memory for one copy only, for example
            self._drain(child)
        else:
            self._replace(child)

    def _end(self, child: children.Child, reason: str | None) -> None:
        """The child is gone, or killed for ``reason``: settle what it held, and free its place."""
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
        why = reason or children.describe_exit(code)
        is_expected = child.is_leaving or self._is_closing or not place.should_run
        place.ended(child, why, jobs.now(), is_expected=is_expected)
        begun = [job.number for job in child.jobs.values() if job.is_accepted]
        self._inputs.settle(child, why, is_closing=self._is_closing)
        if begun and self._on_lost is not None:
            self._on_lost(begun)
        self._on_capacity()
        self.wake()
