"""One delivered message in the pool: where it is, what the broker was told, what Celery hears."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypedDict

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state as worker_state
from celery.worker.request import Request
from kombu.message import Message

from gw_celery import errors
from gw_celery.client import beat_tasks
from gw_celery.pool import counters, dispatch, time_limits
from gw_celery.pool.counters import Result, Stage
from gw_celery.protocol import frames, headers

if TYPE_CHECKING:
    from gw_celery.pool import supervisor
    from gw_celery.pool.child_process import ChildProcess

logger = logging.getLogger(__name__)

#: Name, id, request, body, content type and encoding, as Celery's tracer takes them.
TaskArgs = tuple[str, str, Mapping[str, object], bytes, str, str]
#: Bound methods of Celery's request.
Callback = Callable[..., object]  # type: ignore[explicit-any]  # Celery's: each has arguments of its own
CallbackName = Literal["accept_callback", "callback", "error_callback", "timeout_callback"]


class Options(TypedDict, total=False):
    """What Celery gives with an input."""

    accept_callback: Callback
    callback: Callback
    error_callback: Callback
    timeout_callback: Callback
    #: Seconds, but for what any client may write into a message.
    soft_timeout: float | None
    timeout: float | None
    correlation_id: str
    #: Ours: the task is batched.
    gathers: bool


class State(enum.Enum):
    """Where an input is."""

    #: It was delivered before: how many children it has killed is being read.
    CHECKING = enum.auto()
    #: It has no slot.
    WAITING = enum.auto()
    #: In a child, which has not begun it: it may gather there with others for a batch.
    SENT = enum.auto()
    #: Its child has reported the start, from which its time limits count.
    RUNNING = enum.auto()
    #: It is settled, and its child has let go of neither it nor its slot.
    STOPPING = enum.auto()
    #: The pool does not hold it any more.
    ENDED = enum.auto()


class Settlement(enum.Enum):
    """What the broker was told, through Celery; once."""

    #: Celery has heard how it ended, and acknowledges or rejects the message.
    ANSWERED = enum.auto()
    #: It is never answered: the broker delivers the message again.
    RETURNED = enum.auto()


#: The states that may follow each; ``None`` is that of a message that has just come.
NEXT_STATES: Mapping[State | None, frozenset[State]] = {
    None: frozenset({State.CHECKING, State.WAITING, State.ENDED}),
    State.CHECKING: frozenset({State.WAITING, State.ENDED}),
    State.WAITING: frozenset({State.SENT, State.ENDED}),
    # It waits again when its child is lost before the start.
    State.SENT: frozenset({State.RUNNING, State.WAITING, State.STOPPING, State.ENDED}),
    State.RUNNING: frozenset({State.STOPPING, State.ENDED}),
    State.STOPPING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}
_IN_A_CHILD = frozenset({State.SENT, State.RUNNING, State.STOPPING})
_SETTLED = frozenset({State.STOPPING, State.ENDED})


class PoolRequest:
    """Celery holds it as the result of ``apply_async``, by a weak reference.

    Its ``tell_`` methods call Celery, for later deliveries of the same message as well. They are
    called once ``RequestTable.move`` has done its part: receivers of signals raise, and handlers
    come back here in the middle of them.
    """

    def __init__(
        self,
        number: int,
        args: TaskArgs,
        service: str,
        options: Options,
        pool: supervisor.Supervisor | None,
    ) -> None:
        self.number = number
        self.args = args
        self.service = service
        self.workload = headers.workload_of(self.request)
        #: It counts; replicas are not kept for what beat sends, nor worn by it.
        self.is_work = self.name not in beat_tasks.COMMANDS
        self.soft_limit = options.get("soft_timeout")
        self.hard_limit = options.get("timeout")
        #: It may wait in its child for others that share its call.
        self.gathers = bool(options.get("gathers"))
        #: It was in flight when a child died, and may be the cause.
        self.runs_alone = False
        #: Children that died with it before it began.
        self.losses = 0
        self.arrived_at = now()
        #: When it got its slot.
        self.sent_at = 0.0
        #: When Celery heard that it starts; one that is stopped before it ran has "started", too.
        self.accepted_at: float | None = None
        self.child: ChildProcess | None = None
        #: Later deliveries of the same message, answered with this one.
        self.deliveries: list[PoolRequest] = []
        self._leader: PoolRequest | None = None
        self._state: State | None = None
        self._settlement: Settlement | None = None
        self._options = options
        self._pool = pool

    # -- what it is --

    @property
    def state(self) -> State | None:
        """Where it is; ``None`` for a later delivery of what is here already."""
        return self._state

    @property
    def settlement(self) -> Settlement | None:
        return self._settlement

    @property
    def name(self) -> str:
        return str(self.args[0])

    @property
    def task_id(self) -> str:
        return str(self.args[1])

    @property
    def request(self) -> Mapping[str, object]:
        return self.args[2]

    @property
    def is_redelivered(self) -> bool:
        """Whether the broker has delivered it before, to this worker or another."""
        delivery = self.request.get("delivery_info")
        is_again = isinstance(delivery, Mapping) and delivery.get("redelivered")
        return bool(is_again or self.request.get("x-delivery-count"))

    @property
    def was_requeued(self) -> bool:
        """Whether a person sent it again after it was given up, and nothing has tried it since."""
        return bool(self.request.get(headers.REQUEUED)) and not self.is_redelivered

    @property
    def message(self) -> Message | None:
        """kombu's message that brought it, if any."""
        return getattr(self._celery_request, "message", None)

    @property
    def odd_limit(self) -> object:
        """A limit that is no number of seconds: any client may write it into a message."""
        for limit in (self.soft_limit, self.hard_limit):
            if limit is not None and headers.finite(limit) is None:
                return limit
        return None

    @property
    def _celery_request(self) -> Request:
        """Celery's request, whose bound methods are our callbacks."""
        return getattr(self._options.get("accept_callback"), "__self__", None)

    # -- what Celery asks --

    def terminate(self, signum: int) -> None:
        """Stop this input and no other; Celery calls it for ``revoke(terminate=True)``."""
        if self._pool is not None:
            self._pool.stop(self._leader or self, signum)

    def is_twin_of(self, other: PoolRequest) -> bool:
        """Whether both are deliveries of one message."""
        has_same_id = self.task_id == other.task_id
        return has_same_id and self.request.get("retries") == other.request.get("retries")

    def add_delivery(self, twin: PoolRequest) -> None:
        """Answer ``twin``, another delivery of this input, as this one is answered."""
        self.deliveries.append(twin)
        twin._leader = self
        if self.accepted_at is not None:
            twin.tell_accepted(self.child.pid if self.child else 0, now())

    def was_withdrawn(self) -> bool:
        """Whether it was revoked or has expired since it came; Celery then has answered it."""
        revoked = getattr(self._celery_request, "revoked", None)
        if revoked is None:
            return False
        try:
            if not revoked():
                return False
        except Exception:
            logger.exception("task %s[%s] could not be checked", self.name, self.task_id)
            return False
        for twin in self.deliveries:  # each is acknowledged by its own request
            twin.was_withdrawn()
        return True

    @property
    def can_be_rejected(self) -> bool:
        """Whether every delivery is a message that the broker would take back."""
        deliveries = (self, *self.deliveries)
        return all(hasattr(delivery._celery_request, "reject") for delivery in deliveries)

    def reject(self) -> None:
        """Have the broker deliver it again, to a worker that is ready for it."""
        for delivery in (self, *self.deliveries):
            request = delivery._celery_request
            try:
                request.reject(requeue=True)
            except Exception:  # the broker is away, and will deliver it again by itself
                logger.exception("task %s[%s] could not be given back", self.name, self.task_id)
            worker_state.task_ready(request)

    def fail_when_acknowledged_early(self) -> None:
        """Store that the worker was shut down, for an input that was acknowledged early.

        Celery's cold shutdown calls it a retry, and nothing would ever retry it.
        """
        request = self._celery_request
        if getattr(request, "_already_cancelled", False) and not request.task.acks_late:
            stopped = errors.WorkerStopped(
                f"{self.name}[{self.task_id}] was running when its worker was shut down, and had "
                f"been acknowledged: send it again; acks_late=True would give it to another worker"
            )
            try:
                request.task.backend.mark_as_failure(
                    self.task_id,
                    stopped,
                    request=request._context,
                    store_result=request.store_errors,
                )
            except Exception:  # the backend is away, and the shutdown goes on
                logger.exception("%s", stopped)

    # -- what Celery hears --

    def tell_accepted(self, pid: int, started: float) -> None:
        """The input starts: an early acknowledgement happens here, once."""
        if self.accepted_at is not None:
            return
        self.accepted_at = started
        for delivery in (self, *self.deliveries):
            delivery._call("accept_callback", pid, started)

    def tell_soft_limit(self) -> None:
        self._call("timeout_callback", True, self.soft_limit)

    def tell_broken(self, exc: BaseException) -> None:
        """It has no outcome of its own; Celery decides by the class of ``exc``, and stores it."""
        self._answer("error_callback", _einfo(exc))

    def tell_lost(self, reason: str) -> None:
        self.tell_broken(WorkerLostError(f"{reason} Job: {self.number}."))

    def tell_hard_limit(self) -> None:
        """Celery's time-out callback does everything that there is to do."""
        self._answer("timeout_callback", False, self.hard_limit)

    def tell_report(self, report: frames.ReportFields) -> None:
        """The report by which a child lets go of it."""
        if report[0] == frames.Report.DONE:
            self._answer("callback", (0, report[2], report[3]))
        elif report[0] == frames.Report.ERROR:
            self._tell_error(*report[2:])
        else:
            self.tell_lost("The replica dropped the input unanswered.")

    def _tell_error(
        self, outcome: str, type_name: str, text: str, message: str, traceback: str, requeue: bool
    ) -> None:
        stand_in = Reported(type_name, text, message, traceback)
        if outcome == frames.Outcome.EXIT:
            self.tell_lost(f"Worker exited prematurely: {text}")
        elif outcome == frames.Outcome.UNSTORED:
            # Lost, as far as can be known: our tasks go back to the broker.
            self.tell_lost(f"The outcome could not be stored: {text}")
        elif outcome == frames.Outcome.INTERNAL:
            self.tell_broken(stand_in)
        else:
            einfo = Einfo(_semipredicate(outcome, stand_in, requeue), traceback)
            self._answer("callback", (1, einfo, 0.0))  # the child has stored it

    def _answer(self, name: CallbackName, *args: object) -> None:
        for delivery in (self, *self.deliveries):
            if not delivery._call(name, *args):
                delivery._requeue_unstored()

    def _call(self, name: CallbackName, *args: object) -> bool:
        """Call Celery; whether it returned."""
        callback = self._options.get(name)
        if callback is None:
            return True
        try:
            callback(*args)
        except Exception:
            # Whatever raises here would end the worker: receivers, backends, custom requests.
            logger.exception(
                "%s of task %s[%s] raised; the worker goes on", name, self.name, self.task_id
            )
            return False
        return True

    def _requeue_unstored(self) -> None:
        """The outcome can be stored nowhere: the broker, which has the message, tries again."""
        request = self._celery_request
        if request is None or not request.task.acks_late or request.acknowledged:
            return
        try:
            request.reject(requeue=True)
        except Exception:
            logger.exception("task %s[%s] could not be given back", self.name, self.task_id)


class RequestTable:
    """The requests of a pool, and what follows from their states: queue, slots, counters, limits.

    ``move`` alone changes any of it. It calls nothing outside, so that whatever comes back here
    from a callback of Celery finds all of it in accord.

    Args:
        cancel_timeout: seconds that a child may take to let go of what it was told to stop.
    """

    def __init__(self, cancel_timeout: float) -> None:
        self.queue = dispatch.Queue()
        self.counters = counters.Counters()
        self.limits = time_limits.Limits()
        #: Whether a move is not complete: only the handler of a signal can see that.
        self.is_moving = False
        self._cancel_timeout = cancel_timeout
        self._by_state: dict[State, dict[int, PoolRequest]] = {
            state: {} for state in State if state is not State.ENDED
        }

    def of(self, *states: State) -> list[PoolRequest]:
        """Return the requests in any of ``states``, those of the first state first."""
        return [request for state in states for request in self._by_state[state].values()]

    def count(self, *states: State) -> int:
        return sum(len(self._by_state[state]) for state in states)

    def move(
        self,
        request: PoolRequest,
        to: State,
        at: float,
        *,
        settlement: Settlement | None = None,
        result: Result = Result.GIVEN_BACK,
        child: ChildProcess | None = None,
    ) -> None:
        """Move a request to its next state.

        Args:
            request: the request.
            to: one of ``NEXT_STATES`` of its state.
            at: the time now.
            settlement: what the broker is told, where the request is settled by this.
            result: how it counts then.
            child: what takes it, for SENT.

        Raises:
            ValueError: for a state that cannot follow, and for a request that would be settled
                twice, or ended without it.
        """
        before = request._state
        if to not in NEXT_STATES[before] or (child is None) is (to is State.SENT):
            raise ValueError(f"{request.name}[{request.task_id}] goes from {before} to {to}")
        is_settled = request._settlement is not None
        if (settlement is not None) is (is_settled or to not in _SETTLED):
            raise ValueError(
                f"{request.name}[{request.task_id}] is {request._settlement} and gets {settlement}"
            )
        self.is_moving = True
        try:
            if before is not None:
                del self._by_state[before][request.number]
            if to is not State.ENDED:
                self._by_state[to][request.number] = request
            request._state, request._settlement = to, settlement or request._settlement
            self._count(request, before, at, result if settlement else None)
            self._move_in_queue(request, before)
            self._move_slot(request, child)
            self._set_limits(request, at)
        finally:
            self.is_moving = False

    def _count(
        self, request: PoolRequest, before: State | None, at: float, result: Result | None
    ) -> None:
        service, workload, state = request.service, request.workload, request._state
        if not request.is_work:
            return
        if before is None:
            if state is not State.ENDED:  # what cannot run has not arrived
                self.counters.arrive(service, workload)
            return
        stage = Stage.RUNNING if before in _IN_A_CHILD else Stage.WAITING
        if result is not None:
            busy = at - request.sent_at if stage is Stage.RUNNING else 0.0
            self.counters.settle(service, workload, stage, result, busy)
        elif state is State.SENT:
            request.sent_at = at
            self.counters.move(service, workload, stage, Stage.RUNNING)
        elif state is State.WAITING and stage is Stage.RUNNING:
            self.counters.move(service, workload, stage, Stage.WAITING)

    def _move_in_queue(self, request: PoolRequest, before: State | None) -> None:
        if before is State.WAITING:
            self.queue.remove(request)
        elif request._state is State.WAITING:
            self.queue.put(request, is_first=before is State.SENT)

    def _move_slot(self, request: PoolRequest, child: ChildProcess | None) -> None:
        if child is not None:
            request.child = child
            child.requests[request.number] = request
            child.slots.take(request.service, runs_alone=request.runs_alone)
        elif request.child is not None and request._state not in _IN_A_CHILD:
            del request.child.requests[request.number]
            request.child.slots.give_back(request.service)
            request.child = None

    def _set_limits(self, request: PoolRequest, at: float) -> None:
        if request._state is State.RUNNING:
            self.limits.begin(request, at)
        elif request._state is State.STOPPING:
            self.limits.expect_gone(request, at + self._cancel_timeout)
        elif request._state is State.ENDED:
            self.limits.forget(request)


class Reported(errors.RemoteTaskError):
    """Stands in for an exception that was raised in a child: the parent never rebuilds it."""

    def __init__(self, type_name: str, text: str, message: str, traceback: str) -> None:
        super().__init__(type_name, message, traceback)
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Reported], tuple[str, ...]]:
        return type(self), (self.type_name, self.text, self.message, self.traceback)


class Einfo:
    """What Celery reads of billiard's ``ExceptionInfo``, from texts."""

    internal = False

    def __init__(self, exception: BaseException, traceback: str) -> None:
        self.exception = exception
        self.type = type(exception)
        self.traceback = traceback
        self.exc_info = (self.type, exception, exception.__traceback__)

    def __str__(self) -> str:
        return self.traceback


def _semipredicate(outcome: str, stand_in: Reported, requeue: bool) -> Exception:
    exc: Exception = stand_in
    if outcome == frames.Outcome.RETRY:
        exc = Retry(stand_in.message, stand_in)
    elif outcome == frames.Outcome.IGNORE:
        exc = Ignore(stand_in.message)
    elif outcome == frames.Outcome.REJECT:
        exc = Reject(stand_in.message, requeue=requeue)
    return exc


def _einfo(exc: BaseException) -> ExceptionInfo:
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()


def now() -> float:
    """Return the time of every deadline here, by the same clock in parent and child."""
    return time.monotonic()
