"""Our request class: ``revoke(terminate=True)`` on the threads pool, which cannot terminate."""

from __future__ import annotations

from typing import Any

from celery.concurrency.thread import TaskPool as ThreadPool
from celery.worker import request

from gw_celery.runtime import invoke


class Request(request.Request):
    """A request whose running body can be stopped without stopping its process."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Stop this request; on the threads pool by cancelling its coroutine.

        A synchronous body cannot be stopped there: Celery's own answer, ``NotImplementedError``
        to the control command, says so.
        """
        if not isinstance(pool, ThreadPool):
            super().terminate(pool, signal)
        elif self.time_start is None:
            self._terminate_on_ack = pool, signal
        elif invoke.running.revoke(self.id):
            self._announce_revoked("terminated", True, signal, False)
        else:
            pool.terminate_job(self.worker_pid, signal)
