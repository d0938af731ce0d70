"""Where a caller's watcher gets finished results: Redis notifications, or polling."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, ClassVar, Protocol

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

#: Delays in seconds before retrying an unreachable result backend: the first, and the maximum.
FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0

#: Options for sending a call whose answer a watcher reads. Without them, Celery's backend would
#: subscribe too, on another thread, and wait for an unreachable server. It does not subscribe to a
#: call that ignores its result; the header tells the worker to store the result all the same.
UNPREPARED: Mapping[str, Any] = {
    "ignore_result": True,
    "headers": {"ignore_result": False},
}


class Reader(Protocol):
    """A thread that makes blocking calls, one at a time."""

    def submit(self, send: Callable[[], Any]) -> Future[Any]: ...
    def close(self, timeout: float) -> None: ...


Record = Mapping[str, Any]
Waiter = Future[Record]
#: Seconds between two reads of the records of all waiting calls: a lost connection loses its
#: notifications.
SWEEP = 5.0
#: Seconds after which a silent server counts as lost. The client's own timeout is unsuitable: a
#: subscription is silent while no task ends.
ANSWER_TIMEOUT = 5.0


class Source:
    """Delivers the records of finished tasks to waiting callers, on one loop."""

    #: Exceptions caused by a single record: reading it again does not help.
    unreadable: ClassVar[tuple[type[Exception], ...]]
    #: Exceptions raised while the backend is unreachable; others are logged with their traceback.
    away: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, backend: Any, interval: float = 0.0) -> None:
        self.waiting: dict[str, list[Waiter]] = {}
        self._backend = backend
        self._interval = interval
        self._reading = "the result backend"  # or the record of a task, for the log
        self._backoff = backoff.Backoff(FIRST_DELAY, LONGEST_DELAY)
        self._task: asyncio.Task[None] | None = None

    def prepare(self) -> Mapping[str, Any]:
        """Return options for sending a call; it runs on the sending thread.

        Without options, Celery's own backend prepares to receive the answer.
        """
        return {}

    def add(self, task_id: str, waiter: Waiter) -> None:
        """Give ``waiter`` the record of the task once it has finished."""
        self.waiting.setdefault(task_id, []).append(waiter)
        self._note_change(task_id)
        if self._task is None:
            self._task = asyncio.create_task(self._live())

    def remove(self, task_id: str, waiter: Waiter) -> None:
        """Remove ``waiter``, whether or not it has its record."""
        waiters = self.waiting.get(task_id, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters and self.waiting.pop(task_id, None) is not None:
            self._note_change(task_id)

    def close(self) -> None:
        """Release what the source holds; it is not used any more."""

    async def _live(self) -> None:
        """Read while callers wait, and retry after every failure."""
        while self.waiting:
            try:
                await self._follow()
            except* Exception as failed:
                # Any exception: nothing else would answer the waiting callers.
                exc, delay = failed.exceptions[0], max(self._interval, self._backoff.next())
                traceback = None if isinstance(exc, self.away) else exc
                text = "%s cannot be read: %r; next try in %.1f s"
                logger.warning(text, self._reading, exc, delay, exc_info=traceback)
                await asyncio.sleep(delay)
        self._task = None

    async def _follow(self) -> None:
        """Resolve waiting calls until none is left, or reading fails."""
        raise NotImplementedError

    def _note_change(self, task_id: str) -> None:
        """React to the first or last caller that waits for a task."""

    def _resolve(self, task_id: str, read: Callable[[Any], Record], stored: Any) -> None:
        """Give the record ``read(stored)`` of a finished task to its waiting callers."""
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
    """Holds a connection for subscriptions and one for reading, on the watcher's loop."""

    unreadable = (Exception,)
    away = (OSError, redis.exceptions.RedisError)

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        #: Prefix of a task's channel, whose name is also the key of its record.
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
        # A separate asyncio task, so that new calls cannot delay it.
        while True:
            await asyncio.sleep(SWEEP)
            await self._read(client, self.waiting)

    async def _apply_changes(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        """Subscribe to new calls, then read their records, which may already exist."""
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
    """Asks the backend for each waiting task in turn, every ``interval`` seconds.

    It does so in a thread of its own: backends block, and Django's refuses to be called on a loop.
    """

    unreadable: ClassVar[tuple[type[Exception], ...]] = (
        kombu.exceptions.DecodeError,
        kombu.exceptions.ContentDisallowed,
    )
    away = (Exception,)

    def __init__(self, app: Any, interval: float, start_reader: Callable[[], Reader]) -> None:
        # The app's own backend may be shared by all threads.
        super().__init__(app._get_backend(), interval)
        # Celery rebuilds errors while it reads a record, and turns unknown classes into a plain
        # ``Exception``, which hides them.
        self._backend.exception_to_python = lambda stored: stored
        self._app = app
        self._start_reader = start_reader

    @functools.cached_property
    def _reader(self) -> Reader:
        return self._start_reader()

    def close(self) -> None:
        if "_reader" in vars(self):
            self._reader.close(0.0)

    async def _follow(self) -> None:
        while self.waiting:
            await self._call(_close_outdated)
            for task_id in list(self.waiting):
                await self._ask(task_id)
            self._backoff.reset()
            await asyncio.sleep(self._interval)
        await self._call(_close_outdated)

    async def _ask(self, task_id: str) -> None:
        self._reading = f"the result of {task_id}"
        reading = self._call(lambda: self._backend.get_task_meta(task_id))
        await asyncio.wait([reading])
        try:
            self._resolve(task_id, asyncio.Future.result, reading)
        except Exception:
            # The round ends: an unreachable backend would fail for the others too. Ask for this
            # task last from now on: only its own record may be at fault.
            self.waiting[task_id] = self.waiting.pop(task_id)
            raise

    def _call(self, read: Callable[[], Any]) -> asyncio.Future[Any]:
        reading = asyncio.wrap_future(self._reader.submit(read))
        # The caller may have stopped waiting, and then nothing else looks at a failure.
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return reading


class RpcSource(PolledSource):
    """Reads the reply queue of the watcher's backend, which every message names.

    Celery itself would name a queue of the sending thread, which the watcher does not read.
    """

    unreadable = ()  # reading the queue may fail at the answer of another task

    def prepare(self) -> Mapping[str, Any]:
        """Declare the queue before every call, as Celery does: a restarted broker has lost it."""
        policy = self._app.conf.task_publish_retry_policy
        with self._app.pool.acquire_channel(block=True) as (_, channel):
            maybe_declare(self._backend.binding(channel), retry=True, **policy)
        return {**UNPREPARED, "reply_to": self._backend.oid}


def _close_outdated() -> None:
    """Close Django's broken and old connections of this thread, as Django does for a request."""
    if (db := sys.modules.get("django.db")) is not None:
        db.close_old_connections()


def of(app: Any, interval: float, start_reader: Callable[[], Reader]) -> Source:
    """Return the source for ``app``.

    Args:
        app: the Celery app.
        interval: the polling interval in seconds.
        start_reader: starts the thread that reads from a polled backend.
    """
    # A replica has a subclass of RedisBackend. A Sentinel backend must first look up its server.
    if isinstance(app.backend, RedisBackend) and not isinstance(app.backend, SentinelBackend):
        return RedisSource(app.backend)
    source = RpcSource if isinstance(app.backend, RPCBackend) else PolledSource
    return source(app, interval, start_reader)
