"""The inputs of a pool, from Celery's ``apply_async`` to its callbacks."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from gw_celery import conf, errors
from gw_celery.client import beat_tasks
from gw_celery.cluster import poison_counts
from gw_celery.pool import child_process, counters, dispatch, poison, request, time_limits
from gw_celery.protocol import frames

logger = logging.getLogger(__name__)

#: Seconds that a redelivered input waits for what other workers know of it.
_LONGEST_QUESTION = 2.0
#: What a child reports of an input that waited for too long.
_REFUSED = f"{errors.QueueTimeExceeded.__module__}.{errors.QueueTimeExceeded.__qualname__}"


class Inputs:
    """Inputs that wait for a slot, or that a child holds.

    Args:
        settings: bounds and grace times.
        on_let_go: called when a child has let go of an input.
        on_stuck: called with a child that cannot stop an input.
        shared_deaths: where the workers' counts of deaths meet, if anywhere.
        bury: called with an input that is given up, why, and after how many deaths.
    """

    def __init__(
        self,
        settings: conf.Settings,
        on_let_go: Callable[[child_process.Child], None],
        on_stuck: Callable[[child_process.Child], None],
        shared_deaths: poison_counts.Shared | None = None,
        bury: Callable[[request.Job, str, int], None] | None = None,
    ) -> None:
        self.waiting = dispatch.Dispatcher()
        self.tallies = counters.Tallies()
        self.limits = time_limits.Limits()
        self._settings = settings
        self._deaths = poison.Deaths(settings.max_deaths, shared_deaths)
        #: Redelivered inputs, until it is known whether they kill, and since when.
        self._asked: dict[int, tuple[request.Job, float]] = {}
        self._on_let_go = on_let_go
        self._on_stuck = on_stuck
        self._bury = bury
        self._held: dict[int, request.Job] = {}
        #: Those that a child holds and has not begun: they gather for a batch.
        self._gathering: dict[int, request.Job] = {}
        self._numbers = 0

    def in_flight(self) -> int:
        """Inputs that children hold and that are not answered."""
        return sum(not job.is_answered for job in self._held.values())

    def held(self) -> int:
        """Inputs that children have not let go of, answered or not."""
        return len(self._held)

    def submit(
        self,
        args: tuple[Any, ...],
        service: str,
        options: dict[str, Any],
        terminate: Callable[[request.Job, int], None],
    ) -> request.Job:
        """Take one input; ``dispatch`` starts it."""
        self._numbers += 1
        job = request.Job(self._numbers, args, service, options, terminate)
        if (odd := job.odd_limit()) is not None:
            job.broken(
                errors.UsageError(
                    f"{job.name}[{job.task_id}] has the time limit {odd!r:.100}: send seconds"
                )
            )
            return job
        twin = self._twin(job)
        if twin is not None:
            twin.join(job, request.now())
            return job
        if job.name not in beat_tasks.COMMANDS:  # no work that replicas are kept for
            self.tallies.arrive(job.number, service, counters.workload_of(job.request))
        if job.was_requeued:
            self._deaths.survived(job.task_id)
        self._asked[job.number] = (job, request.now())
        is_asked = job.is_redelivered and self._deaths.ask(job.task_id, lambda: self._admit(job))
        if not is_asked:
            self._admit(job)
        return job

    def forget_waiting(self) -> set[child_process.Child]:
        """Drop what has not started: the broker delivers it again.

        Returns the children that were written to.
        """
        for job in self.waiting.clear() + [asked for asked, _ in self._asked.values()]:
            self.tallies.give_back(job.number)
        self._asked.clear()
        dropped = list(self._gathering.values())
        for job in dropped:
            job.abandon()
            self._dismiss(job)
        return {job.child for job in dropped}

    def give_back(self, service: str) -> None:
        """Let the broker give to other workers what waits here for a service.

        What may only run alone stays: who knows that it kills is here.
        """
        for job in self.waiting.take_out(service):
            if job.give_back():
                self.tallies.give_back(job.number)
            else:
                self.waiting.put(job)

    def withdraw(self) -> set[child_process.Child]:
        """Take out what was revoked or has expired while it gathered for a batch.

        Returns the children that were written to.
        """
        withdrawn = [job for job in self._gathering.values() if job.was_withdrawn()]
        for job in withdrawn:
            self._dismiss(job)
        return {job.child for job in withdrawn}

    def settle_asked(self, now: float) -> None:
        """Take in what Redis has answered, and what it has not in time."""
        self._deaths.settle()
        for job, since in list(self._asked.values()):
            if now - since > _LONGEST_QUESTION:
                self._admit(job)

    def close(self) -> None:
        self._deaths.close()

    def dispatch(self, ready: Iterable[child_process.Child]) -> set[child_process.Child]:
        """Start what has a slot; returns the children that were written to."""
        orders: dict[child_process.Child, list[tuple[Any, ...]]] = {}
        now = request.now()
        for given in self.waiting.assign(ready):
            job, child = given.input, given.child
            if job.was_withdrawn():
                child.room.give_back(job.service)
                self.tallies.give_back(job.number)
                continue
            job.child = child
            child.jobs[job.number] = self._held[job.number] = job
            self.tallies.start(job.number, now)
            if job.gathers:
                self._gathering[job.number] = job
            order = frames.Order.RUN_ALONE if job.runs_alone else frames.Order.RUN
            orders.setdefault(child, []).append((order, job.number, *job.args))
        for child, listed in orders.items():
            child.send(*listed)
        return set(orders)

    def handle(self, child: child_process.Child, report: list[Any], now: float) -> None:
        """Follow one report about an input.

        Raises:
            Garbage: when the child does not hold it.
        """
        kind = report[0]
        job = child.jobs.get(report[1])
        if job is None:
            raise frames.Garbage(f"a {kind} report of job {report[1]}, which it does not hold")
        if kind == frames.Report.ACCEPT:
            self._begun(job, child.pid, min(report[2], now), now)
            return
        if kind == frames.Report.EXPIRED:
            if not job.is_answered:
                job.was_withdrawn()
            return
        if not job.is_answered and _is_answer(report):
            is_success = kind == frames.Report.DONE
            is_refused = not is_success and report[3] == _REFUSED
            self.tallies.serve(job.number, now, is_success=is_success, is_refused=is_refused)
        self._let_go(child, job)
        if kind == frames.Report.DONE:
            job.done(report[2], report[3])
        elif kind == frames.Report.ERROR:
            request.answer(job, report)
        else:
            job.lost("The replica dropped the input unanswered.")
        self._on_let_go(child)

    def stop(self, job: request.Job, signum: int) -> None:
        """Answer one input as terminated, before or after its start, and have its child stop it."""
        if job.is_answered:
            return
        self.waiting.remove(job)
        self._asked.pop(job.number, None)
        if not job.is_accepted:
            # Celery announces a revocation when the input is accepted.
            job.accept(job.child.pid if job.child else 0, request.now())
        job.terminated(signum)
        job.fail_when_nobody_retries()
        self._dismiss(job)

    def abandon_unaccepted(self) -> None:
        """Let go of what was sent but has not begun, and of all limits: the worker ends now."""
        for job in self._held.values():
            if not job.is_accepted:
                job.abandon()
                self.tallies.give_back(job.number)
        self.limits.clear()

    def expire(self, now: float) -> None:
        """Act on the limits that inputs have reached."""
        for job, what in self.limits.due(now):
            if what is time_limits.Limit.SOFT:
                job.soft_timed_out()
                job.child.send((frames.Order.SOFT, job.number, job.soft_limit))
            elif what is time_limits.Limit.HARD:
                job.timed_out()
                self.tallies.serve(job.number, now, is_success=False)
                self._dismiss(job)
            else:
                self._give_up(job)

    def settle(self, child: child_process.Child, reason: str, *, is_closing: bool) -> None:
        """The child is gone: what it had accepted is lost, what it had not starts elsewhere."""
        held = list(child.jobs.values())
        child.jobs.clear()
        for job in held:
            self._held.pop(job.number, None)
            self._gathering.pop(job.number, None)
            self.limits.forget(job)
            job.child = None
        unanswered = [job for job in held if not job.is_answered]
        for job in unanswered:
            job.losses += 1
            if job.losses > self._settings.max_deaths and not job.is_accepted:
                job.accept(child.pid, request.now())  # it kills before it can be told to have begun
        accepted = [job for job in unanswered if job.is_accepted]
        for job in held if is_closing else accepted:
            self.tallies.give_back(job.number)
        if is_closing:  # the shutdown ended the child, and no input is to blame
            for job in accepted:
                job.lost(reason)
            return
        for job in reversed(unanswered):
            if not job.is_accepted:
                self.tallies.wait_again(job.number)
                self.waiting.put(job, first=True)
        if not child.is_unfit:  # it would have died without them
            self._deaths.record(accepted)
        for job in accepted:
            if self._deaths.is_poison(job.task_id):
                self._give_up_poison(job, reason)
            else:
                job.lost(reason)

    def _begun(self, job: request.Job, pid: int, started: float, now: float) -> None:
        was_gathering = self._gathering.pop(job.number, None) is not None
        if was_gathering and not job.is_answered and job.was_withdrawn():
            self._dismiss(job)
        elif not job.is_answered:
            job.accept(pid, started)
            self.limits.begin(job, now)
            job.child.life.began(now, job.hard_limit or math.inf)

    def _admit(self, job: request.Job) -> None:
        """Let an input wait for a slot, alone when it is a suspect; give up one that kills."""
        if self._asked.pop(job.number, None) is None:
            return  # stopped, forgotten, or admitted because Redis took too long
        if self._deaths.is_poison(job.task_id):
            self._give_up_poison(job, "seen by another worker")
            return
        job.runs_alone = self._deaths.is_suspect(job.task_id)
        self.waiting.put(job)

    def _give_up_poison(self, job: request.Job, reason: str) -> None:
        poisoned = _poisoned(job, self._settings.max_deaths, reason)
        if self._bury is not None:
            self._bury(job, str(poisoned), self._deaths.count(job.task_id))
        self._deaths.survived(job.task_id)
        self.tallies.give_back(job.number)
        job.broken(poisoned)

    def _let_go(self, child: child_process.Child, job: request.Job) -> None:
        self.tallies.give_back(job.number)  # unless it is served
        del child.jobs[job.number]
        self._held.pop(job.number, None)
        self._gathering.pop(job.number, None)
        child.room.give_back(job.service)
        if job.name not in beat_tasks.COMMANDS:
            child.served += 1
        self.limits.forget(job)
        if job.runs_alone:
            self._deaths.survived(job.task_id)

    def _dismiss(self, job: request.Job) -> None:
        """The input is answered: its child stops it, or is replaced when it cannot."""
        self.tallies.give_back(job.number)  # unless it is served
        self._gathering.pop(job.number, None)
        child = job.child
        if child is None or job.number not in child.jobs:
            self.limits.forget(job)
            return
        child.send((frames.Order.STOP, job.number))
        self.limits.expect_gone(job, request.now() + self._settings.cancel_timeout)

    def _give_up(self, job: request.Job) -> None:
        logger.error(
            "task %s[%s] did not end %.0f s after it was stopped: %r is replaced (setting "
            "gw_cancel_timeout)",
            job.name,
            job.task_id,
            self._settings.cancel_timeout,
            job.child,
        )
        self._on_stuck(job.child)

    def _twin(self, job: request.Job) -> request.Job | None:
        """The same message, which is here already: the broker lost sight of it, and we did not."""
        if not job.is_redelivered:
            return None
        here: Iterable[request.Job] = itertools.chain(self._held.values(), self.waiting)
        for other in here:
            is_same = other.task_id == job.task_id and not other.is_answered
            if is_same and other.request.get("retries") == job.request.get("retries"):
                return other
        return None


def _is_answer(report: list[Any]) -> bool:
    """Whether an input ran to its end, and does not go back to the broker."""
    if report[0] != frames.Report.ERROR:
        return bool(report[0] == frames.Report.DONE)
    _, _, outcome, *_, requeue = report
    return outcome not in (frames.Outcome.EXIT, frames.Outcome.UNSTORED) and not requeue


def _poisoned(job: request.Job, most: int, reason: str) -> errors.PoisonedInput:
    return errors.PoisonedInput(
        f"{job.name}[{job.task_id}] was running alone when its replica died, {most} times, and is "
        f"not tried again (setting gw_max_deaths). The last time: {reason}"
    )
