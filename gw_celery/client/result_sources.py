"""Where a watcher learns that tasks have finished: notifications from Redis, or asking."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
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
_LOST = (OSError, redis.exceptions.RedisError)


class Source:
    """Has the records of finished tasks for the callers that wait for them, on one loop."""

    def __init__(self, backend: Any) -> None:
        self.waiting: dict[str, list[Waiter]] = {}
        self._backend = backend
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
        self._watch(task_id)
        if self._task is None:
            self._task = asyncio.create_task(self._live())

    def remove(self, task_id: str, waiter: Waiter) -> None:
        """Forget ``waiter``, which may have its record."""
        waiters = self.waiting.get(task_id, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters and self.waiting.pop(task_id, None) is not None:
            self._forget(task_id)

    def _resolve(self, task_id: str, record: Record | Exception) -> None:
        if not isinstance(record, Exception) and record["status"] not in states.READY_STATES:
            return
        if waiters := self.waiting.pop(task_id, []):
            self._forget(task_id)
        for waiter in waiters:
            if not waiter.set_running_or_notify_cancel():
                continue  # the caller has stopped waiting
            if isinstance(record, Exception):
                waiter.set_exception(record)
            else:
                waiter.set_result(record)

    def _watch(self, task_id: str) -> None: ...

    def _forget(self, task_id: str) -> None: ...

    async def _live(self) -> None:
        raise NotImplementedError


class RedisSource(Source):
    """One subscription connection and one for reading, on the loop of the watcher."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self._ids: dict[str, str] = {}  # channel, which is the key, too -> task id
        self._added: set[str] = set()
        self._dropped: set[str] = set()
        self._changed = asyncio.Event()
        self._subscribed = asyncio.Event()

    def prepare(self) -> Mapping[str, Any]:
        return UNPREPARED

    def _watch(self, task_id: str) -> None:
        channel = bytes_to_str(self._backend.get_key_for_task(task_id))
        self._ids[channel] = task_id
        self._added.add(channel)
        self._changed.set()

    def _forget(self, task_id: str) -> None:
        channel = bytes_to_str(self._backend.get_key_for_task(task_id))
        if self._ids.pop(channel, None) is not None:
            self._dropped.add(channel)
            self._changed.set()

    async def _live(self) -> None:
        """Hold the connections for as long as the process lives, making them anew when lost."""
        while True:
            try:
                async with find.async_client(self._backend, socket_timeout=None) as client:
                    await self._follow(client)
            except* Exception as lost:
                # Whatever it is: nothing else would answer the callers that wait.
                exc, delay = lost.exceptions[0], self._backoff.next()
                traceback = None if isinstance(exc, _LOST) else exc
                logger.warning(
                    "lost the result backend, again in %.1f s: %r", delay, exc, exc_info=traceback
                )
                await asyncio.sleep(delay)

    async def _follow(self, client: redis.asyncio.Redis) -> None:
        async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
            self._added.update(self._ids)
            await self._apply(client, pubsub)
            self._backoff.reset()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(pubsub))
                group.create_task(self._update(client, pubsub))
                group.create_task(self._sweep(client))

    async def _update(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        while True:
            await self._changed.wait()
            await self._apply(client, pubsub)

    async def _sweep(self, client: redis.asyncio.Redis) -> None:
        # A task of its own, so that no number of new calls puts it off.
        while True:
            await asyncio.sleep(SWEEP)
            await self._read(client, self._ids)

    async def _apply(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        """Subscribe to what was added since the last time, then read it: it may be there."""
        self._changed.clear()
        dropped, self._dropped = self._dropped - self._ids.keys(), set()
        added, self._added = self._added & self._ids.keys(), set()
        if dropped and pubsub.subscribed:
            await pubsub.unsubscribe(*dropped)
        if added:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await pubsub.subscribe(*added)
            self._subscribed.set()
            await self._read(client, added)

    async def _read(self, client: redis.asyncio.Redis, channels: Iterable[str]) -> None:
        keys = list(channels)
        if not keys:
            return
        async with asyncio.timeout(ANSWER_TIMEOUT):
            records = await client.mget(keys)
        for key, stored in zip(keys, records, strict=True):
            self._report(key, stored)

    async def _listen(self, pubsub: Any) -> None:
        while True:
            if not pubsub.subscribed:
                self._subscribed.clear()
                await self._subscribed.wait()
            message = await pubsub.get_message(timeout=None)
            if message is not None and message["type"] == "message":
                self._report(bytes_to_str(message["channel"]), message["data"])

    def _report(self, channel: str, stored: Any) -> None:
        task_id = self._ids.get(channel)
        if task_id is None or not stored:
            return
        try:
            record = self._backend.decode(stored)
            status = record["status"]
        except Exception as exc:
            self._resolve(task_id, _unreadable(task_id, exc))
            return
        if status is not None:
            self._resolve(task_id, record)


class PolledSource(Source):
    """Asks the backend for each waiting task, ``interval`` seconds apart."""

    #: What reading raises for the one record that was asked for, so that asking again is no use.
    unreadable: ClassVar[tuple[type[Exception], ...]] = (
        kombu.exceptions.DecodeError,
        kombu.exceptions.ContentDisallowed,
    )

    def __init__(self, app: Any, interval: float) -> None:
        super().__init__(app._get_backend())  # the app's own may be shared by all threads
        # Celery rebuilds the errors of records as it reads, and what it cannot rebuild becomes an
        # ``Exception`` that does not tell.
        self._backend.exception_to_python = lambda stored: stored
        self._app = app
        self._interval = interval

    async def _live(self) -> None:
        # The thread is the watcher's own: a backend that blocks delays answers, nothing else.
        while self.waiting:
            delay = await self._ask_all()
            await asyncio.sleep(delay)
        self._task = None

    async def _ask_all(self) -> float:
        """Ask for each waiting task and return the seconds until the next time.

        The first failure ends the round, for a backend that is away would fail them all. Its task
        is asked last from then on, for it may be that one's record alone that cannot be read.
        """
        for task_id in list(self.waiting):
            try:
                self._ask(task_id)
            except Exception as exc:
                delay = max(self._interval, self._backoff.next())
                logger.warning("cannot read %s, again in %.1f s: %r", task_id, delay, exc)
                if task_id in self.waiting:
                    self.waiting[task_id] = self.waiting.pop(task_id)
                return delay
            await asyncio.sleep(0)
        self._backoff.reset()
        return self._interval

    def _ask(self, task_id: str) -> None:
        record: Record | Exception
        try:
            record = self._backend.get_task_meta(task_id)
        except self.unreadable as exc:
            record = _unreadable(task_id, exc)
        self._resolve(task_id, record)


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


def _unreadable(task_id: str, exc: Exception) -> errors.SerializationError:
    """Return the answer in place of a record that cannot be decoded: no better will come."""
    error = errors.SerializationError(
        f"the answer of {task_id} cannot be read: {exc}; are its types registered here, too?"
    )
    error.__cause__ = exc
    return error
