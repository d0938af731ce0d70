"""Where a watcher learns that tasks have finished when nothing tells it: it asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import kombu.exceptions
from kombu.common import maybe_declare

from gw_celery import errors
from gw_celery.policy import backoff

logger = logging.getLogger(__name__)

#: Seconds before a result backend that is away is tried again: at first, and at most.
FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0

#: Options for sending a call whose answer a watcher looks for. Celery's backend would prepare for
#: it, too, where nobody looks, and wait for a server that is away. It does not for a call without
#: a result; the header tells the worker that there is one.
UNPREPARED: Mapping[str, Any] = {
    "ignore_result": True,
    "headers": {"ignore_result": False},
}

Resolve = Callable[[str, Mapping[str, Any] | Exception], None]


class PolledSource:
    """Asks the backend for each waiting task, ``interval`` seconds apart."""

    #: What reading raises for the one record that was asked for, so that asking again is no use.
    unreadable: ClassVar[tuple[type[Exception], ...]] = (
        kombu.exceptions.DecodeError,
        kombu.exceptions.ContentDisallowed,
    )

    def __init__(self, app: Any, resolve: Resolve, interval: float) -> None:
        self._app = app
        self._backend = as_stored(app)
        self._resolve = resolve
        self._interval = interval
        self._backoff = backoff.Backoff(FIRST_DELAY, LONGEST_DELAY)
        self._ids: dict[str, None] = {}
        self._life: asyncio.Task[None] | None = None

    @property
    def sending(self) -> Mapping[str, Any]:
        """Options for sending a call; here Celery's backend has to prepare for each answer."""
        return {}

    def prepare(self) -> None:
        """Called before each sending, on the thread that sends."""

    def watch(self, task_id: str) -> None:
        self._ids[task_id] = None
        if self._life is None:
            self._life = asyncio.create_task(self._live())

    def forget(self, task_id: str) -> None:
        self._ids.pop(task_id, None)

    async def _live(self) -> None:
        # The thread is the watcher's own: a backend that blocks delays answers, nothing else.
        while self._ids:
            delay = await self._ask_all()
            await asyncio.sleep(delay)
        self._life = None

    async def _ask_all(self) -> float:
        """Ask for each waiting task and return the seconds until the next time.

        The first failure ends the round, for a backend that is away would fail them all. Its task
        is asked last from then on, for it may be that one's record alone that cannot be read.
        """
        for task_id in list(self._ids):
            try:
                self._ask(task_id)
            except Exception as exc:
                delay = max(self._interval, self._backoff.next())
                logger.warning("cannot read %s, again in %.1f s: %r", task_id, delay, exc)
                if task_id in self._ids:
                    self._ids[task_id] = self._ids.pop(task_id)
                return delay
            await asyncio.sleep(0)
        self._backoff.reset()
        return self._interval

    def _ask(self, task_id: str) -> None:
        record: Mapping[str, Any] | Exception
        try:
            record = self._backend.get_task_meta(task_id)
        except self.unreadable as exc:
            record = unreadable(task_id, exc)
        self._resolve(task_id, record)


class RpcSource(PolledSource):
    """Asks the reply queue of the watcher's thread, which each message that is sent names.

    By itself Celery names the queue of the thread that sends, where nobody looks.
    """

    unreadable = ()  # reading the queue may fail at the answer of another task

    @property
    def sending(self) -> Mapping[str, Any]:
        return {**UNPREPARED, "reply_to": self._backend.oid}

    def prepare(self) -> None:
        """Declare the queue, every time as Celery does: a broker that restarted forgot it."""
        policy = self._app.conf.task_publish_retry_policy
        with self._app.pool.acquire_channel(block=True) as (_, channel):
            maybe_declare(self._backend.binding(channel), retry=True, **policy)


def as_stored(app: Any) -> Any:
    """Return a result backend whose records have errors as they are stored.

    Celery's rebuilds them as it reads, and what it cannot rebuild becomes an ``Exception`` that
    does not tell. This one is nobody else's: the app's may be shared by all threads.
    """
    backend = app._get_backend()
    backend.exception_to_python = lambda stored: stored
    return backend


def unreadable(task_id: str, exc: Exception) -> errors.SerializationError:
    """Return what whoever waits gets for a record that cannot be decoded: no better will come."""
    error = errors.SerializationError(
        f"the answer of {task_id} cannot be read: {exc}; are its types registered here, too?"
    )
    error.__cause__ = exc
    return error
