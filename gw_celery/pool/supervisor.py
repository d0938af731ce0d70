"""Follows reports, enforces deadlines, and starts and ends children, in the worker's parent.

All of it runs in one thread: the worker's event loop, or the pool's own thread if the transport has
no event loop. ``poll`` reads the children's reports, and ``tick`` then enforces deadlines.
"""

from __future__ import annotations

import logging
import math
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gw_celery import errors
from gw_celery.cluster import fence
from gw_celery.pool import child_process, probes, replica, requests, scores
from gw_celery.pool.child_process import ChildProcess
from gw_celery.protocol import frames

if TYPE_CHECKING:
    from gw_celery.pool import dead_letters, taskpool

logger = logging.getLogger(__name__)

#: Additional seconds for a leaving child, after the limits of its exit hooks.
_LEAVE_MARGIN = 10.0
#: Maximum number of inputs named in one log line.
_NAMED = 5
_LINGERS = (
    "%r has been draining for %.0f s: it waits for inputs that have no time limit, %s. End one "
    "with `celery control terminate SIGTERM ID`, and give them a limit (timeout=, time_limit=)"
)
_NOT_NEEDED = "Worker exited prematurely: it was not needed any more."


class Supervisor:
    """The replicas, the children that fill them, and the inputs that the children hold.

    Args:
        pool: Celery's view of the pool; we call it when the number of free slots changes.
        first: the first frame for each child, without the number of its replica.
        dead_letters: keeps messages that are given up; ``None`` if the settings disable it.
    """

    def __init__(
        self,
        pool: taskpool.TaskPool,
        first: dict[str, object],
        dead_letters: dead_letters.DeadLetters | None = None,
    ) -> None:
        self.pool = pool
        self.settings = pool.plan.settings
        self.slots = pool.plan.slots
        self._first = first
        self.sockets = child_process.Sockets()
        self.requests = requests.Requests(self, pool.cluster.counts, dead_letters)
        self.scores = scores.ReplicaScores(pool.plan)
        self._probes = probes.ChildProbes(pool.plan, self)
        allotment = pool.plan.allotment
        self.replicas = replica.ReplicaSet(None if allotment is None else allotment.shares)
        #: Each live child, and the replica that it fills or will fill.
        self._children: dict[ChildProcess, replica.Replica] = {}
        #: Processes that were killed or are about to end, and are not reaped yet.
        self._dying: list[subprocess.Popen[bytes]] = []
        #: Whether the worker closes; then no further child starts.
        self._is_closing = False
        # Reentrant: a signal handler of Celery may interrupt a method here, and call the pool.
        self.lock = threading.RLock()
        #: Actions that a signal handler requested during a move.
        self._late: list[Callable[[], None]] = []
        #: Number of inputs without a slot at the last check.
        self._waiting = 0
        #: Whether this process can store results; ``None`` if it cannot know.
        self.results = fence.results_of(pool.app)
        #: The outage of the result backend at the last check.
        self._outage = ""

    # -- decisions of operators and of the autoscaler --

    def resize(self, wanted: int) -> None:
        """Set the number of replicas; surplus ones drain."""
        with self.lock:
            self._drain_all(self.replicas.resize(wanted))

    def restart(self, number: int | None) -> None:
        """Drain and replace the child of one replica, or of all in turn."""
        with self.lock:
            self.scores.forget_remembered(self.children())
            self.replicas.restart(number)
        self.sockets.wake()

    def hold(self, number: int | None) -> None:
        """Drain one replica, or all; no child starts there until ``restart``."""
        with self.lock:
            self._drain_all(self.replicas.hold(number))

    def note_queued(self, queued: Mapping[str, int]) -> None:
        """Record the number of messages in the broker by service; safe from any thread."""
        self.scores.note_queued(queued, time.monotonic())

    # -- inputs --

    def submit(
        self, args: requests.TaskArgs, service: str, options: requests.Options
    ) -> requests.PoolRequest:
        with self.lock:
            # An exception here loses the message: a signal handler must postpone its own changes.
            self.requests.table.is_moving = True
            try:
                new = self.requests.submit(args, service, options)
                self._send_waiting()
            finally:
                self.requests.table.is_moving = False
        return new

    def stop(self, stopped: requests.PoolRequest, signum: int) -> None:
        self._after_move(lambda: self.requests.stop(stopped, signum))

    def forget_waiting(self) -> None:
        """Release all inputs that have not started, for redelivery."""
        self._after_move(self.requests.forget_waiting)

    def keep_or_abandon(self) -> None:
        """React to a lost connection of a broker with holds: the pool keeps what it has.

        If this worker was declared lost meanwhile, it stops all, because it runs elsewhere.
        """
        held = self.pool.cluster.holds
        is_lost, held.is_lost = held.is_lost, False
        self._after_move(self.requests.abandon if is_lost else self.requests.keep_reserved)

    @property
    def is_interrupted(self) -> bool:
        """Whether the caller is a signal handler that has interrupted a move or ``submit``."""
        with self.lock:
            return self.requests.table.is_moving

    def _after_move(self, act: Callable[[], None]) -> None:
        """Run ``act`` now, or in the next ``poll`` if the caller has interrupted a move."""
        with self.lock:
            if self.requests.table.is_moving:
                self._late.append(act)
                self.sockets.wake()
            else:
                act()

    def _send_waiting(self) -> None:
        queue = self.requests.table.queue
        # An input that another worker may have been given must not start.
        if queue and self.pool.cluster.holds.is_fresh and not (self.outage() or self._is_closing):
            self.requests.send([child for child in self._children if child.state.is_ready])
        if len(queue) != self._waiting:
            self._waiting = len(queue)
            self.pool.slots_changed()

    # -- the event loop --

    def poll(self, timeout: float = 0.0) -> None:
        """Process the reports of children; wait up to ``timeout`` seconds for the first one."""
        if self.is_interrupted:
            return
        events = self.sockets.wait(timeout)
        with self.lock:
            for child in self.sockets.follow(events):
                self._receive(child)
            while self._late:
                self._late.pop(0)()
            now = time.monotonic()
            self.requests.finish_checks(now)
            if now >= self._probes.next_at:
                self._probes.call_due(now)
            self._send_waiting()
            self.requests.enforce_limits(time.monotonic())

    def tick(self) -> None:
        """Enforce deadlines, reap and start children; once a second, after ``poll``."""
        with self.lock:
            now = time.monotonic()
            for child in self.children():
                if child.process.poll() is not None:
                    while child in self._children and self._receive(child):
                        pass  # read the reports that it wrote before its end
                    self.end(child, None)
                elif (reason := child.state.overdue(now, child.longest_left(now))) is not None:
                    logger.error("%r is killed: it %s", child, reason)
                    child.reason = child.reason or reason
                    self.end(child, f"Worker exited prematurely: it {reason}.")
            self._dying = [process for process in self._dying if process.poll() is None]
            self._fill_replicas(now)
            self._warn_of_lingering(now)
            self._probes.expect_changes()
            self._probes.call_due(now)
            for service in self._probes.unready():
                self.requests.give_back(service)
            self.requests.answer_postponed(now, is_closing=self._is_closing)
            if (outage := self.outage()) != self._outage:
                self._outage = outage
                self.pool.slots_changed()
            self._send_waiting()
            # A measuring replica takes no inputs: let only one idle replica measure at a time.
            ready = [child for child in self._children if child.state.is_ready]
            idle = [child for child in ready if not child.requests]
            if self.requests.table.queue or self._is_closing:
                return
            if (again := self.scores.due_again(idle, now)) is not None:
                again.state.measure_again(now)
                self.advance(again, now)
                self.pool.slots_changed()

    def observe(self) -> None:
        with self.lock:
            # In an outage of the result backend, the worker consumes nothing: ignore the traffic.
            ready = {} if self.outage() else self.ready_by_service()
            counters = self.requests.table.tallies()
            self.scores.observe(time.monotonic(), counters, ready)

    def next_deadline(self) -> float:
        """Return the time of the next limit or probe; infinite without one."""
        return min(self.requests.table.limits.next_at(), self._probes.next_at)

    def outage(self) -> str:
        """Return why a live child, or this process, cannot store results; ``""`` while all can."""
        own = "" if self.results is None else self.results.reason
        return own or next((child.outage for child in self._children if child.outage), "")

    def children(self) -> list[ChildProcess]:
        """Return the live children as a copy, because they start and end during loops over it."""
        return list(self._children)

    def ready_by_service(self) -> dict[str, int]:
        ready = [child for child in self._children if child.state.is_ready]
        return {
            service: sum(child.slots.serves(service) for child in ready) for service in self.slots
        }

    # -- what children report --

    def _receive(self, child: ChildProcess) -> bool:
        """Process a child's reports; return whether there were any and the child still lives."""
        has_reported = False
        try:
            for report in child.receive():
                if child not in self._children:
                    break
                has_reported = True
                try:
                    self._follow(child, report)
                except frames.Garbage:
                    raise
                except Exception:  # the other answers must not be lost with this report
                    logger.exception("%r: its report %.100r could not be handled", child, report)
        except frames.Garbage as exc:
            logger.error("%r is killed: it wrote garbage: %s", child, exc)
            self.end(child, f"Worker exited prematurely: it wrote garbage ({exc}).")
        except EOFError:
            self.end(child, None)
        return has_reported and child in self._children

    def _follow(self, child: ChildProcess, report: frames.ReportFields) -> None:
        kind, now = report[0], time.monotonic()
        if kind == frames.Report.BEAT:
            child.state.beat(now)
            _, child.lag, child.resident_bytes = report
        elif kind == frames.Report.LOADED:
            child.state.loaded(now)
        elif kind == frames.Report.ENTERED:
            child.state.entered(now)
            self.advance(child, now)
        elif kind == frames.Report.MEASURED:
            try:
                self.scores.follow(child, report[1], report[2], now)
            except scores.Failed as exc:  # it leaves, and counts as a failed start
                logger.error("%r is not ready: %s", child, exc)
                child.reason = errors.text_of(exc)
                self._tell_to_leave(child)
            else:
                self.advance(child, now)
        elif kind == frames.Report.PROBED:
            self._probes.follow(child, report, now)
        elif kind == frames.Report.STUCK:
            logger.error("%r is replaced: a stopped call of task %s did not end", child, report[1])
            self.replace(child)
        elif kind == frames.Report.UNFIT:
            # Kill it, as after a failed liveness probe.
            child.is_ill, child.reason = True, report[1]
            self.end(child, f"Worker exited prematurely: {report[1]}.")
        elif kind == frames.Report.FAILED:
            child.reason = errors.cut(report[1])
        elif kind == frames.Report.OUTAGE:
            child.outage = report[1]
            self.pool.slots_changed()
        else:
            held = child.requests.get(report[1])
            self.requests.follow(child, report, now, is_closing=self._is_closing)
            if held and kind == frames.Report.ERROR and report[3] == "builtins.MemoryError":
                logger.error(
                    "%r is replaced: task %s[%s] raised MemoryError in it",
                    *(child, held.name, held.task_id),
                )
                self.replace(child)

    def input_ended(self, child: ChildProcess) -> None:
        """After a child released an input, let it leave if it drains; replace it if it is worn."""
        if child.state.current is replica.State.DRAINING:
            self._leave_when_idle(child)
        elif child.state.is_up:
            most, most_bytes = self.pool.max_tasks, self.pool.max_bytes
            is_worn = most is not None and child.served >= most
            if is_worn or (most_bytes is not None and child.resident_bytes > most_bytes):
                self.replace(child)

    # -- a child on its way to READY --

    def advance(self, child: ChildProcess, now: float) -> None:
        """Move a child towards READY as far as its reports allow."""
        state = child.state
        if state.current is replica.State.PROBING and self._probes.have_started(child, now):
            state.probed(now)
        is_next = state.current is replica.State.BENCHMARKING
        if not (is_next and self.scores.is_measured(child, now)):
            return
        # The child is READY: it takes its place in the replica.
        state.measured(now)
        filled = self._children[child]
        filled.last_error = ""
        if filled.successor is child:
            filled.successor, predecessor = None, filled.child
            filled.child = child
            self._drain(predecessor)
        if not filled.should_run or self._is_closing:
            self._drain(child)
        logger.info("%r is ready", child)
        self.pool.slots_changed()
        self._probes.expect_changes()

    # -- how replicas are filled --

    def _fill_replicas(self, now: float) -> None:
        """Drain replicas to restart, start missing children, replace those that must go."""
        if (restarted := self.replicas.next_to_restart()) is not None:
            self._drain(restarted.child)
        self.replicas.complete()
        for filled in self.replicas:
            child = filled.child
            if child is None:
                if not filled.is_wanted:
                    self.replicas.remove(filled)
                elif filled.successor is not None:
                    filled.child, filled.successor = filled.successor, None
                elif self._may_start(filled, now):
                    filled.child = self._start(filled, now)
            elif child.must_go and child.state.is_up and filled.successor is None:
                if filled.failures:  # a second copy does not load, for example for lack of memory
                    self._drain(child)
                else:
                    self.replace(child)

    def _may_start(self, filled: replica.Replica, now: float) -> bool:
        return filled.should_run and not self._is_closing and now >= filled.retry_at

    def _start(self, filled: replica.Replica, now: float) -> ChildProcess | None:
        state = replica.ChildState(self.settings, now)
        try:
            child = ChildProcess(filled.number, state, self.slots, filled.devices, self.sockets)
        except OSError as exc:
            wait = filled.start_failed(now)
            filled.last_error = f"cannot start a process: {errors.text_of(exc)}"
            logger.error(
                "replica %d %s; next try in %.0f s", filled.number, filled.last_error, wait
            )
            return None
        self._children[child] = filled
        child.send((self._first | {"number": filled.number},))
        return child

    def replace(self, child: ChildProcess) -> None:
        """Start a child's successor, which takes over when READY; the child serves until then."""
        if child not in self._children:
            return
        if child.state.current is replica.State.DRAINING:
            self._leave_when_idle(child)  # a stuck call may be all that it still holds
            return
        child.must_go = True
        filled, now = self._children[child], time.monotonic()
        is_due = filled.child is child and filled.successor is None
        if is_due and self._may_start(filled, now):
            filled.successor = self._start(filled, now)

    # -- how children end --

    def _drain_all(self, drained: list[replica.Replica]) -> None:
        for filled in drained:
            self._drain(filled.child)
            self._drain(filled.successor)
        self.sockets.wake()

    def _drain(self, child: ChildProcess | None) -> None:
        """Send the child no new inputs, and let it leave when it is empty."""
        if child is None or child not in self._children:
            return
        current, now = child.state.current, time.monotonic()
        if current is replica.State.STARTING:
            self.end(child, _NOT_NEEDED)
        elif current is not replica.State.DRAINING:
            child.state.drain(now)
            child.send((frames.Order.DRAIN,))
            self._leave_when_idle(child)
            self.pool.slots_changed()

    def _leave_when_idle(self, child: ChildProcess) -> None:
        if child.unsettled or child.is_leaving:
            return
        if child.requests:  # the remaining inputs were stopped and do not end
            self.end(child, "Worker exited prematurely: it could not stop an input.")
        else:
            child.is_leaving = True
            self._tell_to_leave(child)

    def _tell_to_leave(self, child: ChildProcess) -> None:
        child.state.deadline = time.monotonic() + 2 * self.settings.exit_timeout + _LEAVE_MARGIN
        child.send((frames.Order.LEAVE,))

    def end(self, child: ChildProcess, reason: str | None) -> None:
        """Free the replica and settle the inputs of a child; kill it if there is a ``reason``."""
        if child not in self._children:
            return
        filled = self._children.pop(child)
        if reason is not None:
            child.process.kill()
        code = child.close()
        if code is None:
            child.process.kill()
            self._dying.append(child.process)
        why = reason or child_process.describe_exit(code)
        is_expected = child.is_leaving or self._is_closing or not filled.should_run
        filled.child_ended(child, why, time.monotonic(), is_expected=is_expected)
        self.scores.forget(child)
        begun = [held.number for held in child.requests.values() if held.accepted_at is not None]
        self.requests.lose(child, why, is_closing=self._is_closing)
        if begun and self.pool.cluster.lost is not None:
            self.pool.cluster.lost.forget(begun)
        self.pool.slots_changed()
        self.sockets.wake()

    def _warn_of_lingering(self, now: float) -> None:
        """Log, once per child, the inputs without a limit that keep it from leaving."""
        for child in self._children:
            if not child.state.lingers or child.has_told:
                continue
            unlimited = [held for held in child.unsettled if not held.hard_limit]
            if unlimited:  # empty while the last of them is being stopped
                child.has_told = True
                named = ", ".join(f"{held.name}[{held.task_id}]" for held in unlimited[:_NAMED])
                logger.warning(_LINGERS, child, now - child.state.since, named)

    # -- the end of the worker --

    def close(self) -> None:
        """Start no further input and no further child."""
        with self.lock:
            if not self._is_closing:
                self._is_closing = True
                self._after_move(self.requests.drop_unbegun)

    def give_back(self) -> None:
        """Return the inputs without a slot to the broker."""
        self._after_move(self.requests.give_back_all)

    def give_up_unbegun(self) -> None:
        """Release inputs that have not begun, after reading the last reports."""
        with self.lock:
            self.poll()
            self.requests.give_up_unbegun()

    def give_up_answers(self) -> None:
        """Return the inputs whose answers wait for the result backend to the broker."""
        with self.lock:
            self.requests.answer_postponed(math.inf, is_closing=True)

    def leave(self) -> None:
        """Make every child run its exit hooks and end."""
        with self.lock:
            for child in self.children():
                self._drain(child)

    def interrupt(self, reason: str) -> None:
        """Kill the children with unanswered inputs, which return to the broker or fail."""
        with self.lock:
            self.poll()  # some are answered by now
            for child in self.children():
                if child.unsettled:
                    child.process.kill()
                    self.requests.interrupt(child, reason)
                    self.end(child, reason)

    def kill(self, reason: str) -> None:
        with self.lock:
            self._is_closing = True
            self.interrupt(reason)
            for child in self.children():
                self.end(child, reason)
