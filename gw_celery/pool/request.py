"""One delivered message in the pool, and the callbacks by which Celery follows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state

from gw_celery import errors
from gw_celery.protocol import frames, headers, untrusted

logger = logging.getLogger(__name__)


class Reported(errors.RemoteTaskError):
    """Stands in for an exception that was raised in a child: the parent never rebuilds it."""

    def __init__(self, type_name: str, text: str, message: str, traceback: str) -> None:
        super().__init__(type_name, message, traceback)
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> Any:
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


class Job:
    """Celery holds it as the result of ``apply_async``, by a weak reference."""

    def __init__(
        self,
        number: int,
        args: tuple[Any, ...],
        service: str,
        options: dict[str, Any],
        terminate: Callable[[Job, int], None],
    ) -> None:
        self.number = number
        #: Name, id, request, body, content type and encoding, as Celery's tracer takes them.
        self.args = args
        self.service = service
        self.soft_limit: Any = options.get("soft_timeout")
        self.hard_limit: Any = options.get("timeout")
        self.runs_alone = False
        #: It waits in its child for others that share its call.
        self.gathers = bool(options.get("gathers"))
        self.child: Any = None
        #: Children that died with it.
        self.losses = 0
        self.is_accepted = False
        self.is_answered = False
        #: Later deliveries of the same message, answered with this one.
        self.twins: list[Job] = []
        self._runs_as: Job | None = None
        self._options = options
        self._terminate = terminate

    @property
    def name(self) -> str:
        return str(self.args[0])

    @property
    def task_id(self) -> str:
        return str(self.args[1])

    @property
    def request(self) -> dict[str, Any]:
        request: dict[str, Any] = self.args[2]
        return request

    def odd_limit(self) -> Any:
        """Return a limit that is no number of seconds: any client may write it into a message."""
        for limit in (self.soft_limit, self.hard_limit):
            if limit is not None and untrusted.finite(limit) is None:
                return limit
        return None

    @property
    def is_redelivered(self) -> bool:
        """Whether the broker has delivered it before, to whomever."""
        delivery = self.request.get("delivery_info") or {}
        return bool(delivery.get("redelivered") or self.request.get("x-delivery-count"))

    @property
    def was_requeued(self) -> bool:
        """Whether it was given up and a person sent it again, which nobody has tried yet."""
        return bool(self.request.get(headers.REQUEUED)) and not self.is_redelivered

    @property
    def message(self) -> Any:
        """kombu's message that brought it, if any."""
        return getattr(self._celery_request, "message", None)

    def terminate(self, signum: int) -> None:
        """Stop this input and no other; Celery calls it for ``revoke(terminate=True)``."""
        self._terminate(self._runs_as or self, signum)

    def join(self, twin: Job, now: float) -> None:
        """Answer ``twin``, another delivery of this input, as this one is answered."""
        self.twins.append(twin)
        twin._runs_as = self
        if self.is_accepted:
            twin.accept(self.child.pid if self.child else 0, now)

    def was_withdrawn(self) -> bool:
        """Whether it was revoked or has expired since it came; Celery then has answered it."""
        revoked = getattr(self._celery_request, "revoked", None)
        if revoked is None:
            return False
        try:
            self.is_answered = bool(revoked())
        except Exception:
            logger.exception("task %s[%s] could not be checked", self.name, self.task_id)
        if self.is_answered:
            for twin in self.twins:  # each delivery is acknowledged by its own request
                twin.was_withdrawn()
        return self.is_answered

    def fail_when_nobody_retries(self) -> None:
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

    @property
    def _celery_request(self) -> Any:
        """Celery's request, whose bound methods are our callbacks."""
        return getattr(self._options.get("accept_callback"), "__self__", None)

    def give_back(self) -> bool:
        """Have the broker deliver it again, to whoever is ready for it: it has not begun here.

        Returns False for what is not a message of the broker's.
        """
        requests = [one._celery_request for one in (self, *self.twins)]
        if not all(hasattr(one, "reject") for one in requests):
            return False
        self.abandon()
        for request in requests:
            try:
                request.reject(requeue=True)
            except Exception:  # the broker is away, and will deliver it again by itself
                logger.exception("task %s[%s] could not be given back", self.name, self.task_id)
            state.task_ready(request)
        return True

    def abandon(self) -> None:
        """Never answer: the broker has the message still and gives it to another worker."""
        self.is_answered = True

    def accept(self, pid: int, started: float) -> None:
        """Tell Celery that the input starts: an early acknowledgement happens here."""
        if not self.is_accepted:
            self.is_accepted = True
            self._call("accept_callback", pid, started)
            for twin in self.twins:
                twin.accept(pid, started)

    def done(self, text: str, runtime: float) -> None:
        self._answer("callback", (0, text, runtime))

    def failed(self, einfo: Any, runtime: float = 0.0) -> None:
        """An exception of the task, whose outcome the child has stored."""
        self._answer("callback", (1, einfo, runtime))

    def broken(self, exc: BaseException) -> None:
        """Anything else; Celery decides by the class of ``exc`` and stores the outcome."""
        self._answer("error_callback", _einfo(exc))

    def lost(self, reason: str) -> None:
        self.broken(WorkerLostError(f"{reason} Job: {self.number}."))

    def terminated(self, signum: int) -> None:
        self.broken(Terminated(signum))

    def timed_out(self) -> None:
        """The hard limit: Celery's time-out callback does everything that there is to do."""
        self._answer("timeout_callback", False, self.hard_limit)

    def soft_timed_out(self) -> None:
        if not self.is_answered:
            self._call("timeout_callback", True, self.soft_limit)

    def _answer(self, name: str, *args: Any) -> None:
        if self.is_answered:
            return
        self.is_answered = True
        self._call(name, *args)
        for twin in self.twins:
            twin._answer(name, *args)

    def _call(self, name: str, *args: Any) -> None:
        callback = self._options.get(name)
        if callback is None:
            return
        try:
            callback(*args)
        except Exception:
            # Whatever raises here would end the worker: receivers, backends, custom requests.
            logger.exception(
                "%s of task %s[%s] raised; the worker goes on", name, self.name, self.task_id
            )
            if self.is_answered:
                self._give_back()

    def _give_back(self) -> None:
        """The outcome can be stored nowhere: the broker, which has the message, tries again."""
        request = self._celery_request
        if request is None or not request.task.acks_late or request.acknowledged:
            return
        try:
            request.reject(requeue=True)
        except Exception:
            logger.exception("task %s[%s] could not be given back", self.name, self.task_id)


def answer(job: Job, report: list[Any]) -> None:
    """Tell Celery what an ``ERROR`` report says."""
    _, _, outcome, type_name, text, message, traceback, requeue = report
    stand_in = Reported(type_name, text, message, traceback)
    if outcome == frames.Outcome.EXIT:
        job.lost(f"Worker exited prematurely: {text}")
    elif outcome == frames.Outcome.UNSTORED:
        # Lost, as far as anybody can know: our tasks go back to the broker.
        job.lost(f"The outcome could not be stored: {text}")
    elif outcome == frames.Outcome.INTERNAL:
        job.broken(stand_in)
    else:
        job.failed(Einfo(_semipredicate(outcome, stand_in, requeue), traceback))


def _semipredicate(outcome: str, stand_in: Reported, requeue: bool) -> Any:
    if outcome == frames.Outcome.RETRY:
        return Retry(stand_in.message, stand_in)
    if outcome == frames.Outcome.IGNORE:
        return Ignore(stand_in.message)
    if outcome == frames.Outcome.REJECT:
        return Reject(stand_in.message, requeue=requeue)
    return stand_in


def _einfo(exc: BaseException) -> Any:
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()


def now() -> float:
    """The clock of every deadline here; the same in parent and child."""
    return time.monotonic()
