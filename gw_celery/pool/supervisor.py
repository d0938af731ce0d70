"""What happens next: reports are followed, deadlines judged, inputs given to children.

Everything here runs in one thread: the worker's event loop, or the pool's own where the transport
has none. It is driven by ``poll``, which reads what children report, and by ``tick``, which judges
deadlines after that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gw_celery.cluster import poison_counts
from gw_celery.pool import (
    child_process,
    child_state,
    probes,
    replicas,
    request,
    requests,
    sockets,
)
from gw_celery.pool import replica as pool_replica
from gw_celery.pool import scores as pool_scores
from gw_celery.protocol import frames
from gw_celery.protocol.snapshot import Worker

logger = logging.getLogger(__name__)


class Supervisor:
    """Replicas, their children, and the inputs that they hold."""

    def __init__(
        self,
        setup: pool_replica.Setup,
        on_capacity: Callable[[], None],
        shared_deaths: poison_counts.Shared | None = None,
        bury: Callable[[request.Job, str, int], None] | None = None,
        on_lost: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._setup = setup
        self._sockets = sockets.Sockets()
        self._replicas = replicas.Replicas(
            setup, self._sockets, self._longest_left, self._on_gone, on_capacity
        )
        self._inputs = requests.Inputs(
            setup.settings,
            self._after_input,
            self._replicas.replace,
            shared_deaths,
            bury,
        )
        self._measuring = pool_scores.Measuring(setup, self._send)
        self._probing = probes.Probing(
            setup, self._replicas, self._send, self._advance, on_capacity
        )
        self._on_capacity = on_capacity
        #: Told the numbers of inputs that began in a child that died.
        self._on_lost = on_lost
        # Reentrant: Celery's signal handlers call us in the middle of anything.
        self._lock = threading.RLock()
        #: Inputs that found no slot the last time.
        self._waiting = 0

    # -- size --

    def resize(self, wanted: int) -> None:
        """Grow to, or shrink by draining to, this number of replicas."""
        with self._lock:
            self._replicas.resize(wanted)
        self.wake()

    def restart(self, number: int | None) -> None:
        """Replace the child of one replica, or of all, one after the other, by draining."""
        with self._lock:
            self._measuring.forget_scores(self._replicas)
            self._replicas.restart(number)
        self.wake()

    def hold(self, number: int | None) -> None:
        """Drain one replica, or all, and start no child there until ``restart``."""
        with self._lock:
            self._replicas.hold(number)
        self.wake()

    # -- scores --

    def measure_again(self) -> None:
        """Have every replica measured again, one after the other, when it has nothing to do."""
        with self._lock:
            self._measuring.ask()

    def note_queued(self, queued: Mapping[str, int]) -> None:
        """Hear how many messages wait in the broker, by service."""
        with self._lock:
            self._measuring.note_queued(queued, request.now())

    def observe(self) -> None:
        """Let the traffic correct the scores; about once a second."""
        with self._lock:
            # While results cannot be stored nothing is consumed, however much there is.
            ready = {} if self.outage() else self._ready_by_service()
            self._measuring.observe(request.now(), self._inputs.tallies.seen(), ready)

    # -- inputs --

    def submit(self, args: tuple[Any, ...], service: str, options: dict[str, Any]) -> request.Job:
        """Take one input; it starts when a replica has a slot for it."""
        with self._lock:
            job = self._inputs.submit(args, service, options, self._stop)
            self._dispatch()
        return job

    def _stop(self, job: request.Job, signum: int) -> None:
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
            self._inputs.settle_asked(request.now())
            self._probing.look(request.now())
            self._dispatch()
            self._inputs.expire(request.now())

    def tick(self) -> None:
        """Judge deadlines, reap, start what is missing; once a second, after ``poll``."""
        with self._lock:
            now = request.now()
            for child in self._replicas:
                self._judge(child, now)
            self._replicas.tick(now)
            self._probing.expect()
            self._probing.look(now)
            for service in self._probing.unready():
                self._inputs.give_back(service)
            self._dispatch()
            self._measure_again(now)

    def probe_tick(self) -> None:
        """Call the probes that are due, now."""
        with self._lock:
            self._probing.look(request.now())

    def next_deadline(self) -> float | None:
        """Seconds until an input reaches a limit, or a probe is due; ``None`` without either."""
        now = request.now()
        nexts = (self._inputs.limits.next_in(now), self._probing.next_in(now))
        return min((one for one in nexts if one is not None), default=None)

    # -- the end --

    def close(self) -> None:
        """Take nothing new and start no child any more."""
        with self._lock:
            self._replicas.is_closing = True
            self._watch(self._inputs.forget_waiting())

    def abandon_unaccepted(self) -> None:
        """Give up what has not begun, unanswered, after a last look at what has."""
        with self._lock:
            self.poll()
            self._inputs.abandon_unaccepted()

    def leave(self) -> None:
        """Let every child run its exit hooks and end."""
        with self._lock:
            for child in self._replicas:
                self._replicas.drain(child)

    def is_empty(self) -> bool:
        return not len(self._replicas)

    def kill(self, reason: str) -> None:
        """End every child now; what they hold goes back to the broker or fails with ``reason``."""
        with self._lock:
            self._replicas.is_closing = True
            for child in self._replicas:
                self._replicas.end(child, reason)

    def release(self) -> None:
        """Close what this object holds open; nothing may be called after it."""
        self._inputs.close()
        self._sockets.close()

    # -- what is seen from outside --

    def outage(self) -> str:
        """Why a live child cannot store results; ``""`` while all can, as far as they know."""
        return next((one.outage for one in self._replicas if one.outage), "")

    def snapshot(self, hostname: str) -> Worker:
        """Return the replicas, the inputs and the scores as they are now; from any thread."""
        with self._lock:
            slots = self._setup.slots
            ready = self._ready_by_service()
            return Worker(
                hostname=hostname,
                replicas=self._replicas.seen(),
                ready_slots={service: ready[service] * slots[service] for service in slots},
                waiting=len(self._inputs.waiting),
                waiting_inputs=self._inputs.waiting.by_service(),
                tallies=self._inputs.tallies.seen(),
                outage=self.outage(),
                scores=self._measuring.seen(request.now()),
            )

    def _ready_by_service(self) -> dict[str, int]:
        """READY replicas that take inputs of each service."""
        ready = [child for child in self._replicas if child.life.is_ready]
        return {
            service: sum(child.room.serves(service) for child in ready)
            for service in self._setup.slots
        }

    # -- reports --

    def _receive(self, child: child_process.Child) -> bool:
        """Handle what a child has reported; whether there was anything."""
        received = child.receive()
        garbage = received.garbage
        for report in received.reports:
            if child not in self._replicas:
                break
            try:
                self._handle(child, report)
            except frames.Garbage as exc:
                garbage = exc
                break
            except Exception:  # the others' answers must not be lost with it
                logger.exception("%r: its report %.100r could not be followed", child, report)
        if garbage is not None:
            logger.error("%r wrote garbage and is killed: %s", child, garbage)
            self._replicas.end(child, f"Worker exited prematurely: it wrote garbage ({garbage}).")
        elif received.is_closed:
            self._replicas.end(child, None)
        return bool(received.reports) and child in self._replicas

    def _handle(self, child: child_process.Child, report: list[Any]) -> None:
        kind, now = report[0], request.now()
        if kind == frames.Report.BEAT:
            child.life.beat(now)
            _, child.lag, child.resident_bytes = report
        elif kind == frames.Report.LOADED:
            child.life.loaded(now)
        elif kind == frames.Report.ENTERED:
            child.life.entered(now)
            self._advance(child, now)
        elif kind == frames.Report.MEASURED:
            self._measured(child, report[1], report[2], now)
        elif kind == frames.Report.PROBED:
            self._probing.handle(child, report, now)
        elif kind == frames.Report.STUCK:
            logger.error("%r has a call of %s that nobody waits for: replaced", child, report[1])
            self._replicas.replace(child)
        elif kind == frames.Report.FAILED:
            child.reason = report[1]
        elif kind == frames.Report.OUTAGE:
            child.outage = report[1]
            self._on_capacity()
        else:
            self._inputs.handle(child, report, now)
            if kind == frames.Report.ERROR and report[3] == "builtins.MemoryError":
                logger.error("%r ran out of memory in a task: it is replaced", child)
                self._replicas.replace(child)

    def _advance(self, child: child_process.Child, now: float) -> None:
        """Take a child as far towards READY as it has proved itself."""
        if child.life.state is child_state.State.PROBING and self._probing.has_started(child, now):
            child.life.probed(now)
        is_next = child.life.state is child_state.State.BENCHMARKING
        if is_next and self._measuring.is_over(child, now):
            self._replicas.became_ready(child, now)
            self._probing.expect()

    def _measured(self, child: child_process.Child, call: int, text: str, now: float) -> None:
        try:
            self._measuring.follow(child, call, text, now)
        except pool_scores.Failed as exc:
            self._replicas.refuse(child, str(exc))
        else:
            self._advance(child, now)

    def _measure_again(self, now: float) -> None:
        """Take one idle replica out of service for as long as its benchmarks take."""
        if self._inputs.waiting or self._replicas.is_closing:
            return
        idle = [one for one in self._replicas if one.life.is_ready and not one.jobs]
        if (child := self._measuring.due(idle, now)) is not None:
            child.life.measure_again(now)
            self._advance(child, now)
            self._on_capacity()

    def _after_input(self, child: child_process.Child) -> None:
        if child.life.state is child_state.State.DRAINING:
            self._replicas.leave_when_idle(child)
        elif child.life.is_up and self._setup.is_worn(child):
            self._replicas.replace(child)

    # -- children --

    def _dispatch(self) -> None:
        before = self._waiting
        if self._inputs.waiting and not self.outage():
            ready = [one for one in self._replicas if one.life.is_ready]
            self._watch(self._inputs.dispatch(ready))
        self._waiting = len(self._inputs.waiting)
        if self._waiting != before:
            self._on_capacity()

    def _send(self, child: child_process.Child, order: tuple[Any, ...]) -> None:
        child.send(order)
        self._sockets.watch(child)

    def _watch(self, written: Iterable[child_process.Child]) -> None:
        for child in written:
            self._sockets.watch(child)

    def _longest_left(self, child: child_process.Child, now: float) -> float:
        return self._inputs.limits.longest_left(child.jobs.values(), now)

    def _judge(self, child: child_process.Child, now: float) -> None:
        if child.process.poll() is not None:
            while child in self._replicas and self._receive(child):
                pass  # what it wrote before it ended
            self._replicas.end(child, None)
        elif (reason := child.life.overdue(now)) is not None:
            logger.error("%r %s: it is killed", child, reason)
            child.reason = child.reason or reason
            self._replicas.end(child, f"Worker exited prematurely: it {reason}.")

    def _on_gone(self, child: child_process.Child, why: str) -> None:
        """Settle what a child held that is gone."""
        self._measuring.forget(child)
        begun = [job.number for job in child.jobs.values() if job.is_accepted]
        self._inputs.settle(child, why, is_closing=self._replicas.is_closing)
        if begun and self._on_lost is not None:
            self._on_lost(begun)
        self._on_capacity()
        self.wake()
