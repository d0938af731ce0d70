"""Our request class: on the threads pool an input can be revoked until it has ended."""

from __future__ import annotations

import threading
from typing import Any

from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import TaskRevokedError
from celery.worker import request

from gw_celery.runtime import invoke

#: There, the thread of a body and the control command that revokes it may answer one message at
#: once. kombu raises at the second answer, in the worker's loop: it would end the worker.
_answering = threading.Lock()


class Request(request.Request):
    """A request whose running body can be stopped without stopping its process."""

    #: On the threads pool: it was to be stopped before or as it was accepted.
    _is_unwanted = False

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        super().on_accepted(pid, time_accepted)
        if self._is_unwanted:
            # The thread that calls this runs the body next: not with an exception.
            self._announce_revoked("terminated", True, None, False)
            raise TaskRevokedError(self.id)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Stop this request; on the threads pool by cancelling its coroutine.

        A synchronous body that has begun cannot be stopped there: Celery's own answer,
        ``NotImplementedError`` to the control command, says so.
        """
        if not isinstance(pool, ThreadPool):
            super().terminate(pool, signal)
            return
        self._is_unwanted = True
        # Its thread sets this before it reads that: one of the two sees the other's.
        if self.time_start is None:
            return
        if self.task.gw_method.is_async:
            invoke.running.revoke(self.id)
            self._announce_revoked("terminated", True, signal, False)
        else:
            pool.terminate_job(self.worker_pid, signal)

    def acknowledge(self) -> None:
        with _answering:
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        with _answering:
            super().reject(requeue)
