"""Our request class: on the threads pool an input can be revoked until it has ended."""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import states
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, TaskRevokedError
from celery.worker import request

from gw_celery.runtime import body

logger = logging.getLogger(__name__)


class Request(request.Request):
    """A request whose running body can be stopped without stopping its process."""

    #: On the threads pool: it was to be stopped before or as it was accepted.
    _is_unwanted = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On that pool the thread of a body and the control command that revokes it may answer at
        # once. kombu raises at the second answer, in the worker's loop: it would end the worker.
        # Reentrant: the handler of a signal, which stops the pool, may interrupt an answer.
        self._answering = threading.RLock()

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        super().on_accepted(pid, time_accepted)
        if self._is_unwanted:
            # The thread that calls this runs the body next: not with an exception.
            self._announce_terminated(None)
            raise TaskRevokedError(self.id)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Stop this request; on the threads pool by cancelling its coroutine.

        A synchronous body that has begun cannot be stopped there, which the log says. Celery's own
        answer, ``NotImplementedError``, would end the command before it comes to other inputs.
        """
        if not isinstance(pool, ThreadPool):
            super().terminate(pool, signal)
            return
        self._is_unwanted = True
        # Its thread sets this before it reads that: one of the two sees the other's.
        if self.time_start is None:
            return
        if self.task.gw_method.is_async:
            body.running.revoke(self.id)
        elif not body.running.interrupt(self.id, None):  # it does not wait for its instance
            logger.warning(
                "%s[%s] was to be terminated, and goes on: a synchronous body that has begun "
                "cannot be stopped on the threads pool; use prefork or the GPU pool",
                self.name,
                self.id,
            )
            self._is_unwanted = False
            return
        self._announce_terminated(signal)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().on_failure(exc_info, *args, **kwargs)
        exc = getattr(exc_info.exception, "exc", exc_info.exception)
        if self._is_unwanted and isinstance(exc, Ignore) and self.task.track_started:
            # The tracer writes STARTED; it may have done so over what was announced.
            self._store_revoked()
        return answer

    def _announce_terminated(self, signal: Any) -> None:
        """Store and tell it once, whichever thread comes first."""
        with self._answering:
            if not self._already_revoked:
                self._announce_revoked("terminated", True, signal, False)

    def _store_revoked(self) -> None:
        if self.store_errors:
            revoked = TaskRevokedError("terminated")
            self.task.backend.store_result(self.id, revoked, states.REVOKED, request=self._context)

    def acknowledge(self) -> None:
        with self._answering:
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        with self._answering:
            super().reject(requeue)
