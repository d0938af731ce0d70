"""A delivered message on its way through the pool, in the parent, from submit to its end."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, WorkerLostError
from celery import states
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state as worker_state
from celery.worker.request import Request

from gw_celery import errors
from gw_celery.client import beat_tasks
from gw_celery.cluster import poison_counts
from gw_celery.pool import request_table
from gw_celery.pool.request_table import Limit, Result, Settlement, State
from gw_celery.protocol import frames, headers
from gw_celery.transport import refusals
from gw_celery.worker.undecoded import Undecoded

if TYPE_CHECKING:
    from gw_celery.pool import dead_letters, supervisor
    from gw_celery.pool.child_process import ChildProcess

logger = logging.getLogger(__name__)

#: Name, id, request, body, content type and encoding: the arguments of Celery's tracer.
TaskArgs = tuple[str, str, Mapping[str, object], bytes, str, str]
#: Bound methods of Celery's request.
Callback = Callable[..., object]  # type: ignore[explicit-any]  # Celery's: each has arguments of its own
CallbackName = Literal["accept_callback", "callback", "error_callback", "timeout_callback"]

#: Seconds that an input waits, by its number of returns.
_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
#: Maximum number of remembered suspects; it bounds the memory for those that never come back.
_MOST_SUSPECTS = 100_000
#: Number of lost workers with the same input after which it runs alone: it may be the reason.
_MOST_DELIVERIES = 3
#: Seconds that a redelivered input waits for the counts of other workers.
_MAX_CHECK = 2.0
#: The type name that a child reports for an input that has waited too long.
_REFUSED = f"{errors.QueueTimeExceeded.__module__}.{errors.QueueTimeExceeded.__qualname__}"


class Options(TypedDict, total=False):
    accept_callback: Callback
    callback: Callback
    error_callback: Callback
    timeout_callback: Callback
    #: Seconds, unchecked: a client may have written anything into the message.
    soft_timeout: float | None
    timeout: float | None
    correlation_id: str
    #: Our own option: the task is batched.
    gathers: bool


class PoolRequest:
    """One input in the pool; Celery's request keeps a weak reference to it.

    The ``tell_`` methods call Celery, also for later deliveries of the same message. They run after
    ``RequestTable.move`` has finished, because signal receivers may raise or call the pool again.
    """

    def __init__(
        self,
        number: int,
        args: TaskArgs,
        service: str,
        options: Options,
        pool: supervisor.Supervisor,
    ) -> None:
        self.number = number
        self.args = args
        self.name, self.task_id = str(args[0]), str(args[1])
        self.request = args[2]
        self.service = service
        self.workload = headers.workload_of(self.request)
        #: False for beat's own tasks; the counters and ``max_tasks`` ignore them.
        self.is_work = self.name not in beat_tasks.COMMANDS
        self.soft_limit = options.get("soft_timeout")
        self.hard_limit = options.get("timeout")
        #: Whether it may wait in its child for a batch.
        self.gathers = bool(options.get("gathers"))
        #: Whether it is a suspect: it was in flight when a child died, and may have caused that.
        self.runs_alone = False
        #: Number of children that died while they held it, before its start.
        self.losses = 0
        self.arrived_at = time.monotonic()
        #: Time at which CHECKING ends.
        self.admit_at = 0.0
        #: Time at which it got its slot.
        self.sent_at = 0.0
        #: Time of its hard limit while it runs; infinite without one.
        self.hard_limit_at = 0.0
        #: Start time as reported to Celery; also set for an input that is stopped before its start.
        self.accepted_at: float | None = None
        #: ``None`` for a later delivery of an input that the pool holds. Only
        #: ``RequestTable.move`` changes this and the next two attributes.
        self.state: State | None = None
        self.settlement: Settlement | None = None
        self.child: ChildProcess | None = None
        #: Later deliveries of the same message, which get the same answer.
        self.deliveries: list[PoolRequest] = []
        #: Whether its loss or its return is in the counts of ``PoisonCounter``.
        self.is_counted = False
        #: Called once its answer is given.
        self.on_answer: Callable[[], None] = lambda: None
        self._leader: PoolRequest | None = None
        self._options = options
        self._pool = pool

    # -- facts --

    @property
    def is_redelivered(self) -> bool:
        """Whether the broker has delivered it before, to any worker."""
        delivery = self.request.get("delivery_info")
        is_again = isinstance(delivery, Mapping) and delivery.get("redelivered")
        return bool(is_again or self.request.get("x-delivery-count"))

    @property
    def hold(self) -> str | None:
        """The name of its hold on a Redis broker; ``None`` on other brokers."""
        return headers.hold_of(self.request)

    @property
    def message(self) -> Undecoded | None:
        return getattr(self._celery_request, "message", None)

    @property
    def _celery_request(self) -> Request:
        """Celery's request, whose bound methods are our callbacks."""
        return getattr(self._options.get("accept_callback"), "__self__", None)

    # -- calls by Celery --

    def terminate(self, signum: int) -> None:
        """Stop only this input; Celery calls this method for ``revoke(terminate=True)``."""
        self._pool.stop(self._leader or self, signum)

    def add_delivery(self, twin: PoolRequest) -> None:
        """Give ``twin``, another delivery of this input, the same answer."""
        self.deliveries.append(twin)
        twin._leader = self
        if self.accepted_at is not None:
            twin.tell_accepted(self.child.pid if self.child else 0, time.monotonic())

    def was_withdrawn(self) -> bool:
        """Return whether it was revoked or has expired; Celery has then stored that.

        Raises:
            ResultsUnavailable: if so, and it cannot be stored for now.
            DeclaredLost: if so, and another worker has it now.
        """
        revoked = getattr(self._celery_request, "revoked", None)
        if revoked is None:
            return False
        try:
            if not revoked():
                return False
        except (errors.ResultsUnavailable, errors.DeclaredLost):
            raise
        except Exception:
            logger.exception(
                "task %s[%s] runs: its revocation could not be checked", self.name, self.task_id
            )
            return False
        for twin in self.deliveries:  # each acknowledges its own message
            twin.was_withdrawn()
        return True

    @property
    def can_be_rejected(self) -> bool:
        """Whether the messages of all its deliveries can be returned to the broker."""
        deliveries = (self, *self.deliveries)
        return all(hasattr(delivery._celery_request, "reject") for delivery in deliveries)

    def reject(self) -> None:
        """Make the broker deliver it again, to a worker that is ready for it."""
        for delivery in (self, *self.deliveries):
            delivery._give_back()

    def _give_back(self) -> None:
        self._reject(requeue=True)
        worker_state.task_ready(self._celery_request)

    def _reject(self, *, requeue: bool) -> None:
        try:
            self._celery_request.reject(requeue=requeue)
        except Exception:  # an unreachable broker delivers it again by itself
            logger.exception("task %s[%s] could not be given back", self.name, self.task_id)

    def interrupt(self, reason: str) -> None:
        """Return it to the broker, because its worker ends; fail it if it was acknowledged."""
        if not self.can_be_rejected:
            self.tell_lost(reason)
        elif self._celery_request.acknowledged:
            worker_state.task_ready(self._celery_request)
            self._fail_as_stopped()
        else:
            self.reject()

    def fail_when_acknowledged_early(self) -> None:
        """Store a failure for an early acknowledged input that a cold shutdown interrupted.

        Celery's cold shutdown would store a retry that never happens.
        """
        request = self._celery_request
        if getattr(request, "_already_cancelled", False) and not request.task.acks_late:
            self._fail_as_stopped()

    def _fail_as_stopped(self) -> None:
        request = self._celery_request
        stopped = errors.WorkerStopped(
            f"{self.name}[{self.task_id}] was running when its worker shut down, and had been "
            f"acknowledged: send it again. With acks_late=True the broker gives such an input "
            f"to another worker"
        )
        try:
            request.task.backend.mark_as_failure(
                self.task_id,
                stopped,
                request=request._context,
                store_result=request.store_errors,
            )
        except Exception:  # an unreachable backend must not stop the shutdown
            logger.exception(
                "the failure of task %s[%s] could not be stored: %s",
                *(self.name, self.task_id, stopped),
            )

    # -- calls to Celery --

    def tell_accepted(self, pid: int, started: float) -> None:
        """Tell Celery, once, that the input starts; an early acknowledgement happens here."""
        if self.accepted_at is not None:
            return
        self.accepted_at = started
        for delivery in (self, *self.deliveries):
            delivery._call("accept_callback", pid, started)

    def tell_soft_limit(self) -> None:
        self._call("timeout_callback", True, self.soft_limit)

    def tell_broken(self, exc: BaseException) -> None:
        """Answer an input without an outcome with ``exc``; Celery acts on the class of ``exc``."""
        try:
            raise exc
        except BaseException:
            einfo = ExceptionInfo()
        self._answer("error_callback", einfo)

    def tell_lost(self, reason: str) -> None:
        self.tell_broken(WorkerLostError(f"{reason} Job: {self.number}."))

    def tell_hard_limit(self) -> None:
        """Call Celery's time-out callback, which stores the outcome and acknowledges."""
        self._answer("timeout_callback", False, self.hard_limit)

    def tell_report(self, report: frames.ReportFields) -> None:
        """Pass the outcome that a child reports on to Celery."""
        if report[0] == frames.Report.DONE:
            self._answer("callback", (0, report[2], report[3]))
            return
        _, _, outcome, type_name, text, message, traceback, requeue = report
        stand_in = Reported(type_name, text, message, traceback)
        if outcome == frames.Outcome.INTERNAL:
            self.tell_broken(stand_in)
        elif outcome == frames.Outcome.UNREADABLE:
            self._refuse(errors.UnreadableMessage(message))
        else:
            exc: Exception = stand_in
            if outcome == frames.Outcome.RETRY:
                exc = Retry(message, stand_in)
            elif outcome == frames.Outcome.IGNORE:
                exc = Ignore(message)
            elif outcome == frames.Outcome.REJECT:
                exc = Reject(message, requeue=requeue)
            self._answer("callback", (1, Einfo(exc, traceback), 0.0))  # the child has stored it

    def _answer(self, name: CallbackName, *args: object) -> None:
        for delivery in (self, *self.deliveries):
            self._pool.requests.answer(delivery, name, args)

    def _refuse(self, exc: errors.UnreadableMessage) -> None:
        logger.critical(
            "task %s[%s] is rejected, because its child cannot read the message: %s",
            *(self.name, self.task_id, exc),
        )
        for delivery in (self, *self.deliveries):
            delivery._reject(requeue=False)
        self.tell_broken(exc)

    def answer(self, name: CallbackName, args: Sequence[object]) -> bool:
        """Call Celery with the outcome; return False if the result cannot be stored for now.

        An outcome that can never be stored becomes a stored failure, and is acknowledged.
        """
        failed, request = self._call(name, *args), self._celery_request
        if failed is not None and request is not None:
            unstored = _store_instead(request, name, failed)
            if isinstance(unstored, errors.DeclaredLost):  # another worker has it now
                self._give_back()
                return True
            if unstored is not None:
                if _can_wait(unstored):
                    return False
                logger.error(
                    "task %s[%s] has no stored outcome",
                    *(self.name, self.task_id),
                    exc_info=unstored,
                )
            if request.task.acks_late:
                request.acknowledge()
        self.on_answer()
        return True

    def give_up_answer(self, *, is_closing: bool) -> bool:
        """Return the input to the broker instead; return False if the answer must still wait."""
        request = self._celery_request
        if request is not None and request.task.acks_late and not request.acknowledged:
            self._pool.requests.note_return(self._leader or self)
            self._give_back()
            return True
        if is_closing:
            logger.error(
                "task %s[%s] has no result: it was acknowledged, and the worker stops before "
                "results can be stored",
                *(self.name, self.task_id),
            )
        return is_closing

    def _call(self, name: CallbackName, *args: object) -> Exception | None:
        """Call Celery, and return what the callback raised."""
        callback = self._options.get(name)
        if callback is None:
            return None
        try:
            callback(*args)
        except (errors.ResultsUnavailable, errors.DeclaredLost) as exc:
            logger.info("task %s[%s] is not answered: %s", self.name, self.task_id, exc)
            return exc
        except Exception as exc:
            # Receivers, backends and custom requests may raise, which would end the worker.
            logger.exception(
                "task %s[%s]: its %s raised; the worker goes on", self.name, self.task_id, name
            )
            return exc
        return None


def _can_wait(exc: Exception) -> bool:
    """Return whether ``exc`` means that an outcome can be stored later."""
    return isinstance(exc, errors.ResultsUnavailable) or refusals.is_outage(exc)


def _store_instead(request: Request, name: CallbackName, failed: Exception) -> Exception | None:
    """Store a failure if a callback failed before it stored the outcome.

    Returns:
        Why the outcome is not stored; ``None`` if it is.
    """
    if isinstance(failed, errors.ResultsUnavailable | errors.DeclaredLost):
        return failed
    if name == "callback" or _is_stored(request):  # the child stores before it reports
        return None
    if _can_wait(failed):
        return failed
    broken = errors.OutcomeNotStored(type(failed).__name__, "its callback failed", str(failed))
    try:
        request.task.backend.store_result(
            request.id, broken, states.FAILURE, request=request._context
        )
    except Exception as exc:
        return exc
    return None


def _is_stored(request: Request) -> bool:
    """Return whether nothing is left to store: a hook or an errback may fail after the store."""
    backend = request.task.backend
    with contextlib.suppress(Exception):  # a backend that cannot be read
        return not request.store_errors or (
            backend.persistent and backend.get_state(request.id) in states.READY_STATES
        )
    return False


class Postponed(NamedTuple):
    """An answer that waits until results can be stored."""

    delivery: PoolRequest
    callback: CallbackName
    args: tuple[object, ...]
    #: Time at which the input goes back to the broker instead.
    until: float


class Requests:
    """All requests of a pool.

    Args:
        pool: has the settings, and replaces children.
        shared: the poison counts of all workers; ``None`` without a Redis.
        dead_letters: keeps messages that are given up; ``None`` if the settings disable it.
    """

    def __init__(
        self,
        pool: supervisor.Supervisor,
        shared: poison_counts.Shared | None,
        dead_letters: dead_letters.DeadLetters | None,
    ) -> None:
        self.table = request_table.RequestTable(pool.settings.cancel_timeout)
        self._pool = pool
        self._settings = pool.settings
        self._poison = PoisonCounter(pool.settings.max_deaths, shared)
        self._dead_letters = dead_letters
        self._numbers = itertools.count(1)
        #: The answers that wait for the result backend, the oldest first.
        self.postponed: collections.deque[Postponed] = collections.deque()

    def unsettled(self) -> int:
        return self.table.count(State.CHECKING, State.WAITING, State.SENT, State.RUNNING)

    def held(self) -> int:
        """Return the number of inputs in children, settled or not."""
        return self.table.count(State.SENT, State.RUNNING, State.STOPPING)

    # -- from Celery to a slot --

    def submit(self, args: TaskArgs, service: str, options: Options) -> PoolRequest:
        """Accept an input; ``send`` starts it."""
        new = PoolRequest(next(self._numbers), args, service, options, self._pool)
        limits = (new.soft_limit, new.hard_limit)
        odd = [limit for limit in limits if limit is not None and headers.finite(limit) is None]
        if odd:  # a client may write anything into a message
            self._settle(new, Settlement.ANSWERED)
            new.tell_broken(
                errors.UsageError(
                    f"{new.name}[{new.task_id}] has the time limit {odd[0]!r:.100}: send seconds"
                )
            )
            return new
        is_redelivered = new.is_redelivered
        if is_redelivered and (leader := self._leader_of(new)) is not None:
            leader.add_delivery(new)
            return new
        if not is_redelivered and new.request.get(headers.REQUEUED):
            # An operator sent it again from the dead letters: its poison count starts at 0.
            self._poison.forget(new.task_id)
        if is_redelivered or self._poison.knows(new.task_id):
            self.table.move(new, State.CHECKING, time.monotonic())
            # Ask what it has done in all workers.
            is_asked = is_redelivered and self._poison.ask(new.number, new.task_id)
            pause = self._poison.pause(new.task_id)
            new.admit_at = new.arrived_at + max(pause, _MAX_CHECK if is_asked else 0.0)
            if not (is_asked or pause):
                self._admit(new)
        else:
            self.table.move(new, State.WAITING, time.monotonic())
        return new

    def _leader_of(self, twin: PoolRequest) -> PoolRequest | None:
        """Return the request that the pool already holds for the same message, if any."""
        key = (twin.task_id, twin.request.get("retries"))
        here = self.table.of(State.SENT, State.RUNNING, State.WAITING)
        same = (other for other in here if (other.task_id, other.request.get("retries")) == key)
        return next(same, None)

    def finish_checks(self, now: float) -> None:
        """Admit the inputs whose counts have arrived from Redis or are late, after their pauses."""
        checking = self.table.of(State.CHECKING)
        answered = set(self._poison.answers()) if checking else set()
        for checked in checking:
            if checked.number in answered:
                checked.admit_at = checked.arrived_at + self._poison.pause(checked.task_id)
            if now >= checked.admit_at and checked.settlement is None:
                self._admit(checked)

    def _admit(self, checked: PoolRequest) -> None:
        """Queue an input (a suspect runs alone), or give it up if it is poison."""
        if self._poison.is_poison(checked.task_id):
            self._settle(checked, Settlement.ANSWERED)
            self._give_up_poison(checked, "seen by another worker")
            return
        lost = headers.finite(checked.request.get(headers.DELIVERIES)) or 0
        checked.runs_alone = checked.task_id in self._poison.suspects or lost >= _MOST_DELIVERIES
        self.table.move(checked, State.WAITING, time.monotonic())

    def send(self, ready: Sequence[ChildProcess]) -> None:
        orders: dict[ChildProcess, list[frames.OrderFields]] = {}
        for waiting, child in self.table.queue.assign(ready):
            if self._settle_withdrawn(waiting):
                continue
            self.table.move(waiting, State.SENT, time.monotonic(), child=child)
            order = frames.Order.RUN_ALONE if waiting.runs_alone else frames.Order.RUN
            orders.setdefault(child, []).append((order, waiting.number, *waiting.args))
        for child, listed in orders.items():
            child.send(*listed)

    # -- what a child reports --

    def follow(
        self, child: ChildProcess, report: frames.ReportFields, now: float, *, is_closing: bool
    ) -> None:
        """Process a child's report about an input.

        Args:
            child: the child.
            report: its report.
            now: the current time.
            is_closing: whether the worker shuts down, and has made its children drop inputs.

        Raises:
            Garbage: if the child does not hold the input.
        """
        kind = report[0]
        held = child.requests.get(report[1])
        if held is None:
            raise frames.Garbage(f"a {kind} report of input {report[1]}, which it does not hold")
        if kind == frames.Report.ACCEPT:
            is_new = held.state is State.SENT
            if is_new and not (held.gathers and self._settle_withdrawn(held)):
                self.table.move(held, State.RUNNING, now)
                if held.settlement is None:  # a signal handler may have stopped it
                    held.tell_accepted(child.pid, min(report[2], now))
            return
        if kind == frames.Report.LINKS:
            if (message := held.message) is not None:
                message.learn_links(report[2])
            return
        if kind == frames.Report.EXPIRED:
            self._settle_withdrawn(held)
            return
        # The child releases the input, with or without an answer.
        before = held.settlement
        settlement = Settlement.ANSWERED if _has_outcome(report) else Settlement.RETURNED
        self.table.move(
            held,
            State.ENDED,
            now,
            settlement=None if before else settlement,
            result=_result(report),
        )
        child.served += held.is_work
        if held.settlement is Settlement.ANSWERED and self._poison.knows(held.task_id):
            self._poison.forget(held.task_id)
        if before is None and settlement is Settlement.ANSWERED:
            held.tell_report(report)
        elif before is None:
            self._return(held, report, is_closing=is_closing)
        self._pool.input_ended(child)

    def _return(self, ended: PoolRequest, report: frames.ReportFields, *, is_closing: bool) -> None:
        """Let the broker deliver an input again, or give it up after ``gw_max_deaths`` returns."""
        is_gone, has_begun = report[0] == frames.Report.GONE, ended.accepted_at is not None
        is_fenced = not is_gone and report[2] == frames.Outcome.FENCED
        if is_fenced or (is_closing and not has_begun):  # no input is to blame
            ended.reject()
            return
        self.note_return(ended)
        why = "The replica dropped the input unanswered."
        if not is_gone:
            why = f"The outcome could not be stored: {report[4]}"
        if self._poison.is_poison(ended.task_id):
            self._give_up_poison(ended, why)
        elif has_begun or not ended.can_be_rejected:
            # As after the loss of a child: our tasks return to the broker.
            ended.tell_lost(why)
        else:
            ended.reject()

    def note_return(self, returned: PoolRequest) -> None:
        """Count, once, that an input goes back to the broker without an answer."""
        if not returned.is_counted:
            returned.is_counted = True
            self._poison.record_return(returned.task_id)

    # -- answers in an outage of the result backend --

    def answer(
        self, delivery: PoolRequest, callback: CallbackName, args: tuple[object, ...]
    ) -> None:
        """Give an answer, or keep it while results cannot be stored."""
        until = time.monotonic() + self._settings.store_timeout
        answer = Postponed(delivery, callback, args, until)
        if not self._give(answer):
            self.postponed.append(answer)

    def answer_postponed(self, now: float, *, is_closing: bool) -> None:
        """Give the postponed answers when results can be stored, or the inputs back in time."""
        for _ in range(len(self.postponed)):
            answer = self.postponed.popleft()
            if self._give(answer):
                continue
            if now < answer.until or not answer.delivery.give_up_answer(is_closing=is_closing):
                self.postponed.append(answer)

    def _give(self, answer: Postponed) -> bool:
        # What a child reports, it has stored; the other answers are stored here.
        is_away = answer.callback != "callback" and self._pool.outage()
        return not is_away and answer.delivery.answer(answer.callback, answer.args)

    # -- other ends --

    def stop(self, stopped: PoolRequest, signum: int) -> None:
        """Answer an input as terminated, and make its child stop it."""
        if stopped.settlement is not None:
            return
        pid = stopped.child.pid if stopped.child else 0
        self._settle(stopped, Settlement.ANSWERED)
        if stopped.accepted_at is None:
            # Celery sends the event of a revocation when the input is accepted.
            stopped.tell_accepted(pid, time.monotonic())
        stopped.tell_broken(Terminated(signum))
        stopped.fail_when_acknowledged_early()

    def withdraw(self) -> None:
        """Settle inputs that were revoked or have expired while they gathered for a batch."""
        for sent in self.table.of(State.SENT):
            if sent.gathers:
                self._settle_withdrawn(sent)

    def holds(self) -> list[str]:
        """Return the names of the holds of all unanswered inputs and their later deliveries."""
        here = self.table.of(State.CHECKING, State.WAITING, State.SENT, State.RUNNING)
        unsettled = [request for request in here if request.settlement is None]
        deliveries = [one for request in unsettled for one in (request, *request.deliveries)]
        deliveries += [answer.delivery for answer in self.postponed]
        return [one.hold for one in deliveries if one.hold is not None]

    def keep_reserved(self) -> None:
        """Register waiting inputs with Celery again, which forgets them with a connection."""
        for waiting in self.table.of(State.WAITING, State.CHECKING, State.SENT):
            if waiting._celery_request is not None:
                worker_state.task_reserved(waiting._celery_request)

    def abandon(self) -> None:
        """Stop all inputs, because this worker was declared lost, and they run elsewhere."""
        for here in self.table.of(State.CHECKING, State.WAITING, State.SENT, State.RUNNING):
            if here.settlement is None:
                self._settle(here, Settlement.RETURNED)
                for delivery in (here, *here.deliveries):
                    worker_state.task_ready(delivery._celery_request)

    def forget_waiting(self) -> None:
        """Release all inputs that have not started, for redelivery."""
        for held in self.table.of(State.WAITING, State.CHECKING, State.SENT):
            if held.state is not State.SENT or held.gathers:
                self._settle(held, Settlement.RETURNED)

    def give_back(self, service: str) -> None:
        """Return the waiting inputs of a service to the broker, for other workers.

        A suspect stays: other workers may not know that it kills children.
        """
        self._give_back([one for one in self.table.queue.of(service) if one.can_be_rejected])

    def give_back_all(self) -> None:
        """Return the waiting inputs of all services, because the worker ends."""
        self._give_back(self.table.of(State.WAITING, State.CHECKING))

    def _give_back(self, listed: Iterable[PoolRequest]) -> None:
        for waiting in listed:
            if waiting.settlement is None:
                self._settle(waiting, Settlement.RETURNED)
                if waiting.can_be_rejected:
                    waiting.reject()

    def drop_unbegun(self) -> None:
        """Make the children drop what has not begun; the broker gets what they report as gone."""
        for sent in self.table.of(State.SENT):
            if sent.child is not None:
                sent.child.send((frames.Order.DROP, sent.number))

    def interrupt(self, child: ChildProcess, reason: str) -> None:
        """Give back the unanswered inputs of a child that was killed because the worker ends."""
        for held in child.unsettled:
            self._settle(held, Settlement.ANSWERED)
            held.interrupt(reason)

    def give_up_unbegun(self) -> None:
        """Release the inputs that have not begun, and all limits, because the worker ends now."""
        for sent in self.table.of(State.SENT):
            self.table.move(sent, State.STOPPING, time.monotonic(), settlement=Settlement.RETURNED)
        self.table.limits.clear()

    def enforce_limits(self, now: float) -> None:
        for reached, limit in self.table.limits.due(now):
            child = reached.child
            if child is None:
                continue
            if limit is Limit.SOFT:
                child.send((frames.Order.SOFT, reached.number, reached.soft_limit))
                reached.tell_soft_limit()
            elif limit is Limit.HARD:
                self._settle(reached, Settlement.ANSWERED, Result.NO_VALUE)
                reached.tell_hard_limit()
            else:
                logger.error(
                    "%r is replaced: task %s[%s] did not end %.0f s after it was stopped (setting "
                    "gw_cancel_timeout)",
                    child,
                    reached.name,
                    reached.task_id,
                    self._settings.cancel_timeout,
                )
                self._pool.replace(child)

    def lose(self, child: ChildProcess, reason: str, *, is_closing: bool) -> None:
        """Handle the end of a child: begun inputs are lost, and the others start in another child.

        Args:
            child: the child that ended.
            reason: the reason, for the answers of lost inputs.
            is_closing: whether the shutdown of the worker ended it, so that no input is to blame.
        """
        lost, at = [], time.monotonic()
        for held in reversed(list(child.requests.values())):
            if held.settlement is not None:
                self.table.move(held, State.ENDED, at)
                continue
            has_begun = held.state is State.RUNNING
            held.losses += not has_begun
            if has_begun or (held.losses > self._settings.max_deaths and not is_closing):
                self.table.move(held, State.ENDED, at, settlement=Settlement.ANSWERED)
                lost.append(held)
            else:
                self.table.move(held, State.WAITING, at)
        lost.reverse()
        if not (is_closing or child.is_unfit):  # the inputs did not cause its end
            self._poison.record(lost)
        for begun in lost:
            begun.is_counted = True
            if begun.accepted_at is None:
                begun.tell_accepted(child.pid, at)
            if not is_closing and self._poison.is_poison(begun.task_id):
                self._give_up_poison(begun, reason)
            else:
                begun.tell_lost(reason)

    def _settle_withdrawn(self, checked: PoolRequest) -> bool:
        """Settle an input that was revoked or has expired; return whether it is settled now.

        Celery stores the outcome during the check, and its receivers may call the pool again.
        """
        try:
            is_withdrawn = checked.settlement is None and checked.was_withdrawn()
        except (errors.ResultsUnavailable, errors.DeclaredLost) as exc:
            # It must not run: the broker delivers it after the outage.
            self._settle(checked, Settlement.RETURNED)
            if isinstance(exc, errors.ResultsUnavailable):
                self.note_return(checked)
            checked.reject()
            return True
        if is_withdrawn and checked.settlement is None:
            self._settle(checked, Settlement.ANSWERED)
        return checked.settlement is not None

    def _settle(
        self,
        settled: PoolRequest,
        settlement: Settlement,
        result: Result = Result.GIVEN_BACK,
    ) -> None:
        """Settle an input: end it, or order the child that holds it to stop it."""
        child, at = settled.child, time.monotonic()
        to = State.ENDED if child is None else State.STOPPING
        self.table.move(settled, to, at, settlement=settlement, result=result)
        if child is not None:
            child.send((frames.Order.STOP, settled.number))

    def _give_up_poison(self, ended: PoolRequest, reason: str) -> None:
        deaths = self._poison.suspects.get(ended.task_id, 0)
        returns = self._poison.returns.get(ended.task_id, 0)
        how = f"was running alone when its replica died, {deaths} times"
        if returns:
            how = f"had no answer that could be stored, {returns} times"
            how += (
                f", and was running alone when its replica died, {deaths} times" if deaths else ""
            )
        poisoned = errors.PoisonedInput(
            f"{ended.name}[{ended.task_id}] {how}, and is not tried again (setting gw_max_deaths). "
            f"The last time: {reason}"
        )

        def bury() -> None:
            if self._dead_letters is not None:
                self._dead_letters.keep(ended, str(poisoned), deaths)
            self._poison.forget(ended.task_id)

        # If this answer cannot be stored either, the input comes back, and does not run.
        ended.on_answer = bury
        ended.tell_broken(poisoned)


def _result(report: frames.ReportFields) -> Result:
    if report[0] == frames.Report.DONE:
        return Result.VALUE
    if not _has_outcome(report) or report[-1]:  # the body has rejected it, with its return
        return Result.GIVEN_BACK
    return Result.REFUSED if report[3] == _REFUSED else Result.NO_VALUE


def _has_outcome(report: frames.ReportFields) -> bool:
    """Return whether a child has stored an outcome, or leaves the answer to Celery."""
    if report[0] != frames.Report.ERROR:
        return bool(report[0] == frames.Report.DONE)
    return report[2] not in (frames.Outcome.UNSTORED, frames.Outcome.FENCED)


class PoisonCounter:
    """Counts, for each suspect, what it has cost, to find poison inputs.

    That is the children that died while it ran alone, and its returns to the broker because no
    answer could be stored. All workers share the counts through the Redis of the broker or of the
    result backend. Without such a Redis, each worker counts for itself.

    Args:
        most: sum of both counts at which an input is given up.
        shared: the counts of all workers; ``None`` without a Redis.
    """

    def __init__(self, most: int, shared: poison_counts.Shared | None = None) -> None:
        #: Number of children known to have died while an input ran alone, by task id.
        self.suspects: collections.OrderedDict[str, int] = collections.OrderedDict()
        #: Number of returns; such an input runs beside others.
        self.returns: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._most = most
        self._shared = shared

    def record(self, inputs: Iterable[PoolRequest]) -> None:
        """Count the death of a child for its inputs: 1 for an input that ran alone, else 0."""
        for lost in inputs:
            task_id, deaths = lost.task_id, int(lost.runs_alone)
            _remember(self.suspects, task_id, self.suspects.get(task_id, 0) + deaths)
            if self._shared is not None:
                self._shared.record(task_id, deaths)

    def record_return(self, task_id: str) -> None:
        """Count that an input goes back to the broker because its answer cannot be stored."""
        _remember(self.returns, task_id, self.returns.get(task_id, 0) + 1)
        if self._shared is not None:
            self._shared.record_return(task_id)

    def ask(self, number: int, task_id: str) -> bool:
        """Request the counts of an input from other workers; ``answers`` then yields ``number``.

        Returns:
            Whether an answer will come.
        """
        return self._shared is not None and self._shared.ask(number, task_id)

    def answers(self) -> Iterator[int]:
        """Store the counts that Redis has returned, and yield the numbers of the requests."""
        for number, task_id, *counts in () if self._shared is None else self._shared.answers():
            for counter, count in zip((self.suspects, self.returns), counts, strict=True):
                if count is not None:
                    # What this worker counted may not have reached Redis yet.
                    _remember(counter, task_id, max(count, counter.get(task_id, 0)))
            yield number

    def forget(self, task_id: str) -> None:
        self.suspects.pop(task_id, None)
        self.returns.pop(task_id, None)
        if self._shared is not None:
            self._shared.forget(task_id)

    def knows(self, task_id: str) -> bool:
        return task_id in self.suspects or task_id in self.returns

    def pause(self, task_id: str) -> float:
        """Return the seconds that an input waits after its last return."""
        returns = self.returns.get(task_id, 0)
        return _PAUSES[min(returns, len(_PAUSES) - 1)]

    def is_poison(self, task_id: str) -> bool:
        return self.suspects.get(task_id, 0) + self.returns.get(task_id, 0) >= self._most


def _remember(counter: collections.OrderedDict[str, int], task_id: str, count: int) -> None:
    counter[task_id] = count
    counter.move_to_end(task_id)
    while len(counter) > _MOST_SUSPECTS:
        counter.popitem(last=False)


class Reported(errors.RemoteTaskError):
    """Represents an exception of a child; the parent never unpickles or rebuilds the original."""

    def __init__(self, type_name: str, text: str, message: str, traceback: str) -> None:
        super().__init__(type_name, message, traceback)
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Reported], tuple[str, ...]]:
        return type(self), (self.type_name, self.text, self.message, self.traceback)


class Einfo:
    """The parts of billiard's ``ExceptionInfo`` that Celery reads, built from text."""

    internal = False

    def __init__(self, exception: BaseException, traceback: str) -> None:
        self.exception = exception
        self.type = type(exception)
        self.traceback = traceback
        self.exc_info = (self.type, exception, exception.__traceback__)

    def __str__(self) -> str:
        return self.traceback
