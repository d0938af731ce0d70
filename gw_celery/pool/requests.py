"""The way of an input through the pool: submit, check, send, begin, and how it ends.

Each method is one stage. It decides, has ``RequestTable.move`` change the state, writes to the
child, and calls Celery last.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from billiard.exceptions import Terminated

from gw_celery import errors
from gw_celery.pool import poison, request, time_limits
from gw_celery.pool.counters import Result
from gw_celery.pool.request import PoolRequest, Settlement, State
from gw_celery.protocol import frames

if TYPE_CHECKING:
    from gw_celery.pool import dead_letters, supervisor
    from gw_celery.pool.child_process import ChildProcess

logger = logging.getLogger(__name__)

#: Seconds that a redelivered input waits for what other workers know of it.
_MAX_CHECK = 2.0
#: What a child reports of an input that waited for too long.
_REFUSED = f"{errors.QueueTimeExceeded.__module__}.{errors.QueueTimeExceeded.__qualname__}"


class Requests:
    """All requests of a pool.

    Args:
        pool: has the settings, and decides what becomes of children.
        poison: the inputs that kill their children.
        dead_letters: keeps the messages that are given up; ``None`` where the settings say so.
    """

    def __init__(
        self,
        pool: supervisor.Supervisor,
        poison: poison.PoisonCounter,
        dead_letters: dead_letters.DeadLetters | None,
    ) -> None:
        self.table = request.RequestTable(pool.setup.settings.cancel_timeout)
        self._pool = pool
        self._settings = pool.setup.settings
        self._poison = poison
        self._dead_letters = dead_letters
        self._numbers = itertools.count(1)

    def in_flight(self) -> int:
        """Inputs that children hold and that are not settled."""
        return self.table.count(State.SENT, State.RUNNING)

    def held(self) -> int:
        """Inputs that children have not let go of, settled or not."""
        return self.table.count(State.SENT, State.RUNNING, State.STOPPING)

    # -- from Celery to a slot --

    def submit(self, args: request.TaskArgs, service: str, options: request.Options) -> PoolRequest:
        """Take one input; ``send`` starts it."""
        new = PoolRequest(next(self._numbers), args, service, options, self._pool)
        if (odd := new.odd_limit) is not None:
            self.table.move(new, State.ENDED, request.now(), settlement=Settlement.ANSWERED)
            new.tell_broken(
                errors.UsageError(
                    f"{new.name}[{new.task_id}] has the time limit {odd!r:.100}: send seconds"
                )
            )
            return new
        if (leader := self._leader_of(new)) is not None:
            leader.add_delivery(new)
            return new
        if new.was_requeued:
            self._poison.forget(new.task_id)
        if new.is_redelivered or self._poison.is_suspect(new.task_id):
            self._check(new)
        else:
            self.table.move(new, State.WAITING, request.now())
        return new

    def _leader_of(self, new: PoolRequest) -> PoolRequest | None:
        """The same message, which is here already: the broker lost sight of it, and we did not."""
        if not new.is_redelivered:
            return None
        here = self.table.of(State.SENT, State.RUNNING, State.WAITING)
        return next((other for other in here if other.is_twin_of(new)), None)

    def _check(self, new: PoolRequest) -> None:
        """Learn how many children it has killed, in other workers, too."""
        self.table.move(new, State.CHECKING, request.now())
        is_asked = new.is_redelivered and self._poison.ask(new.number, new.task_id)
        if not is_asked:
            self._admit(new)

    def finish_checks(self, now: float) -> None:
        """Take in what Redis has answered, and what it has not in time."""
        answered = set(self._poison.answers())
        for checked in self.table.of(State.CHECKING):
            is_known = checked.number in answered or now - checked.arrived_at > _MAX_CHECK
            if is_known and checked.settlement is None:
                self._admit(checked)

    def _admit(self, checked: PoolRequest) -> None:
        """Let an input wait for a slot, alone when it is a suspect; give up one that kills."""
        if self._poison.is_poison(checked.task_id):
            self.table.move(checked, State.ENDED, request.now(), settlement=Settlement.ANSWERED)
            self._give_up_poison(checked, "seen by another worker")
            return
        checked.runs_alone = self._poison.is_suspect(checked.task_id)
        self.table.move(checked, State.WAITING, request.now())

    def send(self, ready: Iterable[ChildProcess]) -> None:
        """Give the children what has a slot there."""
        orders: dict[ChildProcess, list[frames.OrderFields]] = {}
        for waiting, child in self.table.queue.assign(ready):
            if self._settle_withdrawn(waiting):
                continue
            self.table.move(waiting, State.SENT, request.now(), child=child)
            order = frames.Order.RUN_ALONE if waiting.runs_alone else frames.Order.RUN
            orders.setdefault(child, []).append((order, waiting.number, *waiting.args))
        for child, listed in orders.items():
            child.send(*listed)

    # -- what a child reports --

    def follow(self, child: ChildProcess, report: frames.ReportFields, now: float) -> None:
        """Follow one report about an input.

        Raises:
            Garbage: when the child does not hold it.
        """
        kind = report[0]
        held = child.requests.get(report[1])
        if held is None:
            raise frames.Garbage(f"a {kind} report of input {report[1]}, which it does not hold")
        if kind == frames.Report.ACCEPT:
            self._begin(held, child, min(report[2], now), now)
        elif kind == frames.Report.EXPIRED:
            self._settle_withdrawn(held)
        else:
            self._end(held, child, report)

    def _begin(self, sent: PoolRequest, child: ChildProcess, started: float, now: float) -> None:
        if sent.state is not State.SENT:
            return
        if sent.gathers and self._settle_withdrawn(sent):
            return
        self.table.move(sent, State.RUNNING, request.now())
        child.state.began(now, sent.hard_limit or math.inf)
        if sent.settlement is None:  # the handler of a signal may have stopped it by now
            sent.tell_accepted(child.pid, started)

    def _end(self, held: PoolRequest, child: ChildProcess, report: frames.ReportFields) -> None:
        """The child lets go of it, with an answer or without."""
        is_late = held.settlement is not None
        self.table.move(
            held,
            State.ENDED,
            request.now(),
            settlement=None if is_late else Settlement.ANSWERED,
            result=_result(report),
        )
        child.served += held.is_work
        if held.runs_alone:
            self._poison.forget(held.task_id)
        if not is_late:
            held.tell_report(report)
        self._pool.input_ended(child)

    # -- other ends --

    def stop(self, stopped: PoolRequest, signum: int) -> None:
        """Answer one input as terminated, before or after its start, and have its child stop it."""
        if stopped.settlement is not None:
            return
        pid = stopped.child.pid if stopped.child else 0
        self._settle(stopped, Settlement.ANSWERED)
        if stopped.accepted_at is None:
            # Celery announces a revocation when the input is accepted.
            stopped.tell_accepted(pid, request.now())
        stopped.tell_broken(Terminated(signum))
        stopped.fail_when_acknowledged_early()

    def withdraw(self) -> None:
        """Take out what was revoked or has expired while it gathered for a batch."""
        for gathering in self._gathering():
            self._settle_withdrawn(gathering)

    def forget_waiting(self) -> None:
        """Drop what has not started: the broker delivers it again."""
        for waiting in self.table.of(State.WAITING, State.CHECKING):
            self.table.move(waiting, State.ENDED, request.now(), settlement=Settlement.RETURNED)
        for gathering in self._gathering():
            self._settle(gathering, Settlement.RETURNED)

    def give_back(self, service: str) -> None:
        """Let the broker give to other workers what waits here for a service.

        What may only run alone stays: that it kills is known here.
        """
        for waiting in self.table.queue.of(service):
            if waiting.settlement is None and waiting.can_be_rejected:
                self.table.move(waiting, State.ENDED, request.now(), settlement=Settlement.RETURNED)
                waiting.reject()

    def give_up_unbegun(self) -> None:
        """Let go of what was sent but has not begun, and of all limits: the worker ends now."""
        for sent in self.table.of(State.SENT):
            self.table.move(sent, State.STOPPING, request.now(), settlement=Settlement.RETURNED)
        self.table.limits.clear()

    def enforce_limits(self, now: float) -> None:
        """Act on the limits that inputs have reached."""
        for reached, limit in self.table.limits.due(now):
            child = reached.child
            if child is None:
                continue
            if limit is time_limits.Limit.SOFT:
                child.send((frames.Order.SOFT, reached.number, reached.soft_limit))
                reached.tell_soft_limit()
            elif limit is time_limits.Limit.HARD:
                self._settle(reached, Settlement.ANSWERED, Result.NO_VALUE)
                reached.tell_hard_limit()
            else:
                logger.error(
                    "task %s[%s] did not end %.0f s after it was stopped: %r is replaced (setting "
                    "gw_cancel_timeout)",
                    reached.name,
                    reached.task_id,
                    self._settings.cancel_timeout,
                    child,
                )
                self._pool.replace(child)

    def lose(self, child: ChildProcess, reason: str, *, is_closing: bool) -> None:
        """The child is gone: what it had begun is lost, what it had not starts elsewhere.

        Args:
            is_closing: the shutdown ended the child, and no input is to blame.
        """
        lost = []
        for held in reversed(list(child.requests.values())):
            if held.settlement is not None:
                self.table.move(held, State.ENDED, request.now())
            elif held.state is State.RUNNING or self._kills_before_its_start(held, is_closing):
                self.table.move(held, State.ENDED, request.now(), settlement=Settlement.ANSWERED)
                lost.append(held)
            elif is_closing:
                self.table.move(held, State.ENDED, request.now(), settlement=Settlement.RETURNED)
            else:
                self.table.move(held, State.WAITING, request.now())
        lost.reverse()
        if not (is_closing or child.is_unfit):  # it would have died without them
            self._poison.record(lost)
        for begun in lost:
            if begun.accepted_at is None:
                begun.tell_accepted(child.pid, request.now())
            if not is_closing and self._poison.is_poison(begun.task_id):
                self._give_up_poison(begun, reason)
            else:
                begun.tell_lost(reason)

    def _kills_before_its_start(self, sent: PoolRequest, is_closing: bool) -> bool:
        sent.losses += 1
        return sent.losses > self._settings.max_deaths and not is_closing

    # -- inside --

    def _gathering(self) -> list[PoolRequest]:
        """What children hold and have not begun, as it waits for others to share a call with."""
        return [sent for sent in self.table.of(State.SENT) if sent.gathers]

    def _settle_withdrawn(self, checked: PoolRequest) -> bool:
        """Settle an input that was revoked or has expired; whether it is settled.

        Celery stores that as it is asked, and may come back here in the middle of it.
        """
        is_withdrawn = checked.settlement is None and checked.was_withdrawn()
        if is_withdrawn and checked.settlement is None:
            self._settle(checked, Settlement.ANSWERED)
        return checked.settlement is not None

    def _settle(
        self,
        settled: PoolRequest,
        settlement: Settlement,
        result: Result = Result.GIVEN_BACK,
    ) -> None:
        """End an input, or have the child stop it that holds it."""
        if settled.child is None:
            self.table.move(
                settled, State.ENDED, request.now(), settlement=settlement, result=result
            )
            return
        self.table.move(
            settled, State.STOPPING, request.now(), settlement=settlement, result=result
        )
        settled.child.send((frames.Order.STOP, settled.number))

    def _give_up_poison(self, ended: PoolRequest, reason: str) -> None:
        poisoned = errors.PoisonedInput(
            f"{ended.name}[{ended.task_id}] was running alone when its replica died, "
            f"{self._settings.max_deaths} times, and is not tried again (setting gw_max_deaths). "
            f"The last time: {reason}"
        )
        if self._dead_letters is not None:
            deaths = self._poison.count(ended.task_id)
            self._dead_letters.keep(ended, str(poisoned), deaths)
        self._poison.forget(ended.task_id)
        ended.tell_broken(poisoned)


def _result(report: frames.ReportFields) -> Result:
    """How an input counts that ends by this report."""
    if report[0] == frames.Report.DONE:
        return Result.VALUE
    if report[0] != frames.Report.ERROR:
        return Result.GIVEN_BACK
    _, _, outcome, type_name, *_, requeue = report
    if outcome in (frames.Outcome.EXIT, frames.Outcome.UNSTORED) or requeue:
        return Result.GIVEN_BACK
    return Result.REFUSED if type_name == _REFUSED else Result.NO_VALUE
