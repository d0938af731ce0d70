"""Publish in a few daemon threads.

Publishing is synchronous in Celery and blocks for as long as a broker is away, or frozen: on a
caller's thread no time-out could end it. The threads of ``concurrent.futures`` cannot be used:
the interpreter waits for them, without limit, before it exits.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from gw_celery import errors
from gw_celery.client import task_context


class Publisher:
    """Runs what it is given in ``threads`` daemon threads at most, in the order given."""

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._changing = threading.Lock()
        self._is_closed = False

    @property
    def backlog(self) -> int:
        """How many publications have not begun."""
        return self._queue.qsize()

    def submit(self, send: Callable[[], Any]) -> Future[Any]:
        """Run ``send`` in the caller's context and identity; one not begun can be cancelled."""
        context = contextvars.copy_context()
        context.run(task_context.follow)  # Celery notes the task that a call is made in
        future: Future[Any] = Future()
        with self._changing:
            if self._is_closed:
                future.set_exception(
                    errors.UsageError("this process is exiting: make calls before it does")
                )
            else:
                self._queue.put(lambda: _settle(future, context, send))
                self._add_thread()
        return future

    def close(self, timeout: float) -> None:
        """End the threads once all is published; wait ``timeout`` seconds for that at most."""
        with self._changing:
            self._is_closed = True
            for _ in self._threads:
                self._queue.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _add_thread(self) -> None:
        if self._idle.acquire(blocking=False) or len(self._threads) == self._most:
            return
        name = f"gw-publish-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while (publish := self._queue.get()) is not None:
            publish()
            del publish  # the idle thread must not keep what was sent
            self._idle.release()


def _settle(future: Future[Any], context: contextvars.Context, send: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(context.run(send))
    except BaseException as exc:
        future.set_exception(exc)
