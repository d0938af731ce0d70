"""Where a watcher learns that tasks have finished: notifications from Redis, or asking."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, ClassVar

import kombu.exceptions
import redis.asyncio
import redis.exceptions
from celery import states
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.backends.rpc import RPCBackend
from kombu.common import maybe_declare
from kombu.utils.encoding import bytes_to_str

from gw_celery import errors
from gw_celery.policy import backoff
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: Seconds before a result backend that is away is tried again: at first, and at most.
FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0

#: Options for sending a call whose answer a watcher looks for. Celery's backend would prepare for
#: it, too, on another thread, and wait for a server that is away. It does not for a call without
#: a result; the header tells the worker that there is one.
UNPREPARED: Mapping[str, Any] = {
    "ignore_result": True,
    "headers": {"ignore_result": False},
}

Record = Mapping[str, Any]
Waiter = Future[Record]
#: Seconds after which the records of all waiting calls are read again, in case a notification
#: was lost with its connection.
SWEEP = 5.0
#: Seconds in which the server answers, or it counts as lost. Not the client's own time-out: a
#: subscription is silent for as long as nothing ends.
ANSWER_TIMEOUT = 5.0


class Source:
    """Has the records of finished tasks for the callers that wait for them, on one loop."""

    #: What is raised for the one record that is read, so that reading it again is no use.
    unreadable: ClassVar[tuple[type[Exception], ...]]
    #: What is raised while the backend is away; anything else is logged with its traceback.
    away: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, backend: Any, interval: float = 0.0) -> None:
        self.waiting: dict[str, list[Waiter]] = {}
        self._backend = backend
        self._interval = interval
        self._reading = "the result backend"  # or the record of a task, for the log
        self._backoff = backoff.Backoff(FIRST_DELAY, LONGEST_DELAY)
        self._task: asyncio.Task[None] | None = None

    def prepare(self) -> Mapping[str, Any]:
        """Return the options for sending a call; runs on the thread that sends it.

        With none, Celery's backend prepares for the answer.
        """
        return {}

    def add(self, task_id: str, waiter: Waiter) -> None:
        """Let ``waiter`` have the record of the task once it has finished."""
        self.waiting.setdefault(task_id, []).append(waiter)
        self._note_change(task_id)
        if self._task is None:
            self._task = asyncio.create_task(self._live())

    def remove(self, task_id: str, waiter: Waiter) -> None:
        """Forget ``waiter``, which may have its record."""
        waiters = self.waiting.get(task_id, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters and self.waiting.pop(task_id, None) is not None:
            self._note_change(task_id)

    async def _live(self) -> None:
        """Read for as long as callers wait, however often it fails."""
        while self.waiting:
            try:
                await self._follow()
            except* Exception as failed:
                # Whatever it is: nothing else would answer the callers that wait.
                exc, delay = failed.exceptions[0], max(self._interval, self._backoff.next())
                traceback = None if isinstance(exc, self.away) else exc
                text = "%s cannot be read: %r; next try in %.1f s"
                logger.warning(text, self._reading, exc, delay, exc_info=traceback)
                await asyncio.sleep(delay)
        self._task = None

    async def _follow(self) -> None:
        """Resolve what waits until nothing does, or reading fails."""
        raise NotImplementedError

    def _note_change(self, task_id: str) -> None:
        """The task is waited for since now, or no longer."""

    def _resolve(self, task_id: str, read: Callable[[Any], Record], stored: Any) -> None:
        """Answer those that wait for a task with what ``read(stored)`` returns, if it is over."""
        if not stored or task_id not in self.waiting:
            return
        record: Record | errors.SerializationError
        try:
            record = read(stored)
            if record["status"] not in states.READY_STATES:
                return
        except self.unreadable as exc:
            record = errors.SerializationError(
                f"the answer of {task_id} cannot be read: {exc}; register its types in "
                f"this process, too"
            )
            record.__cause__ = exc
        self._note_change(task_id)
        for waiter in self.waiting.pop(task_id):
            if not waiter.set_running_or_notify_cancel():
                continue  # the caller has stopped waiting
            if isinstance(record, Exception):
                waiter.set_exception(record)
            else:
                waiter.set_result(record)


class RedisSource(Source):
    """One subscription connection and one for reading, on the loop of the watcher."""

    unreadable = (Exception,)
    away = (OSError, redis.exceptions.RedisError)

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        #: Before the task's id in the name of its channel, which is the key of its record, too.
        self._prefix = bytes_to_str(backend.task_keyprefix)
        self._changes: set[str] = set()
        self._changed = asyncio.Event()

    def prepare(self) -> Mapping[str, Any]:
        return UNPREPARED

    def _note_change(self, task_id: str) -> None:
        self._changes.add(task_id)
        self._changed.set()

    async def _follow(self) -> None:
        async with (
            find.async_client(self._backend, socket_timeout=None) as client,
            client.pubsub(ignore_subscribe_messages=True) as pubsub,
        ):
            self._changes.update(self.waiting)
            await self._apply_changes(client, pubsub)
            self._backoff.reset()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(pubsub))
                group.create_task(self._update(client, pubsub))
                group.create_task(self._sweep(client))

    async def _listen(self, pubsub: Any) -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            if message is not None and message["type"] == "message":
                channel = bytes_to_str(message["channel"])
                task_id = channel.removeprefix(self._prefix)
                self._resolve(task_id, self._backend.decode, message["data"])

    async def _update(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        while True:
            await self._changed.wait()
            await self._apply_changes(client, pubsub)

    async def _sweep(self, client: redis.asyncio.Redis) -> None:
        # A task of its own, so that no number of new calls puts it off.
        while True:
            await asyncio.sleep(SWEEP)
            await self._read(client, self.waiting)

    async def _apply_changes(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        """Subscribe to what was added since the last time, then read it: it may be there."""
        self._changed.clear()
        changes, self._changes = self._changes, set()
        added = changes & self.waiting.keys()
        async with asyncio.timeout(ANSWER_TIMEOUT):  # of either: the first one connects
            if dropped := changes - added:
                await pubsub.unsubscribe(*(self._prefix + task_id for task_id in dropped))
            if added:
                await pubsub.subscribe(*(self._prefix + task_id for task_id in added))
        await self._read(client, added)

    async def _read(self, client: redis.asyncio.Redis, task_ids: Iterable[str]) -> None:
        if not (ids := list(task_ids)):
            return
        async with asyncio.timeout(ANSWER_TIMEOUT):
            records = await client.mget([self._prefix + task_id for task_id in ids])
        for task_id, stored in zip(ids, records, strict=True):
            self._resolve(task_id, self._backend.decode, stored)


class PolledSource(Source):
    """Asks the backend for each waiting task, ``interval`` seconds apart."""

    unreadable: ClassVar[tuple[type[Exception], ...]] = (
        kombu.exceptions.DecodeError,
        kombu.exceptions.ContentDisallowed,
    )
    away = (Exception,)

    def __init__(self, app: Any, interval: float) -> None:
        # The app's own may be shared by all threads.
        super().__init__(app._get_backend(), interval)
        # Celery rebuilds the errors of records as it reads, and what it cannot rebuild becomes an
        # ``Exception`` that does not tell.
        self._backend.exception_to_python = lambda stored: stored
        self._app = app

    async def _follow(self) -> None:
        # The thread is the watcher's own: a backend that blocks delays answers, nothing else.
        while self.waiting:
            for task_id in list(self.waiting):
                self._reading = f"the result of {task_id}"
                try:
                    self._resolve(task_id, self._backend.get_task_meta, task_id)
                except Exception:
                    # The round ends, for a backend that is away would fail the others, too. This
                    # one is asked last from now on: it may be its record alone that is at fault.
                    self.waiting[task_id] = self.waiting.pop(task_id)
                    raise
                await asyncio.sleep(0)
            self._backoff.reset()
            await asyncio.sleep(self._interval)


class RpcSource(PolledSource):
    """Asks the reply queue of the watcher's thread, which each message that is sent names.

    By itself Celery names the queue of the thread that sends, which is not read.
    """

    unreadable = ()  # reading the queue may fail at the answer of another task

    def prepare(self) -> Mapping[str, Any]:
        """Declare the queue, every time as Celery does: a broker that restarted forgot it."""
        policy = self._app.conf.task_publish_retry_policy
        with self._app.pool.acquire_channel(block=True) as (_, channel):
            maybe_declare(self._backend.binding(channel), retry=True, **policy)
        return {**UNPREPARED, "reply_to": self._backend.oid}


def of(app: Any, interval: float) -> Source:
    """Return the source for ``app``; ``interval`` is that of a backend that has to be asked."""
    # A replica of the GPU pool has a subclass. Sentinels would have to be asked for the server.
    if isinstance(app.backend, RedisBackend) and not isinstance(app.backend, SentinelBackend):
        return RedisSource(app.backend)
    source = RpcSource if isinstance(app.backend, RPCBackend) else PolledSource
    return source(app, interval)
