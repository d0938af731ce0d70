"""Where a watcher learns that tasks have finished: notifications from Redis, or asking."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import celery.backends.redis
import celery.backends.rpc
import redis.asyncio
import redis.exceptions

from gw_celery import conf, errors

logger = logging.getLogger(__name__)

Resolve = Callable[[str, Mapping[str, Any] | Exception], None]

#: Seconds after which the records of all waiting calls are read again, in case a notification
#: was lost with its connection.
SWEEP = 5.0
_LOST = (OSError, redis.exceptions.RedisError)


def of(app: Any, resolve: Resolve, settings: conf.Settings) -> RedisSource | PolledSource:
    """Return the source for ``app``; ``resolve(task_id, record)`` is called on its loop."""
    if type(app.backend) is celery.backends.redis.RedisBackend:
        return RedisSource(app.backend, resolve)
    return PolledSource(app, resolve, settings.poll_interval)


class RedisSource:
    """One subscription connection and one for reading, on the loop of the watcher."""

    #: Whether answers come to a queue of the thread that published, so that it must be this one.
    owns_reply_queue = False
    #: Options for sending a call that this source will see the answer of. Celery's backend would
    #: subscribe to it, too, on a connection that nobody reads here, and wait 20 s for a server
    #: that is away. It does not for a call without a result; the header tells the worker that
    #: there is one.
    sending: ClassVar[dict[str, Any]] = {
        "ignore_result": True,
        "headers": {"ignore_result": False},
    }

    def __init__(self, backend: Any, resolve: Resolve) -> None:
        self._backend = backend
        self._resolve = resolve
        self._ids: dict[str, str] = {}  # channel, which is the key, too -> task id
        self._added: set[str] = set()
        self._dropped: set[str] = set()
        self._changed = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    def watch(self, task_id: str) -> None:
        channel = _text(self._backend.get_key_for_task(task_id))
        self._ids[channel] = task_id
        self._added.add(channel)
        self._wake()

    def forget(self, task_id: str) -> None:
        channel = _text(self._backend.get_key_for_task(task_id))
        if self._ids.pop(channel, None) is not None:
            self._dropped.add(channel)
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        if self._life is None:
            self._life = asyncio.create_task(self._live())

    async def _live(self) -> None:
        """Hold the connections for as long as the process lives, making them anew when lost."""
        delay = 0.1
        while True:
            client = _client(self._backend)
            try:
                await self._follow(client)
            except* _LOST as lost:
                logger.warning(
                    "lost the result backend, again in %.1f s: %s", delay, lost.exceptions[0]
                )
                await asyncio.sleep(delay)
                delay = min(2 * delay, 5.0)
            finally:
                await client.aclose()

    async def _follow(self, client: redis.asyncio.Redis) -> None:
        async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
            self._added.update(self._ids)
            await self._apply(client, pubsub)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(pubsub))
                group.create_task(self._update(client, pubsub))

    async def _update(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        while True:
            try:
                async with asyncio.timeout(SWEEP):
                    await self._changed.wait()
            except TimeoutError:
                await self._read(client, self._ids)
            await self._apply(client, pubsub)

    async def _apply(self, client: redis.asyncio.Redis, pubsub: Any) -> None:
        """Subscribe to what was added since the last time, then read it: it may be there."""
        self._changed.clear()
        dropped, self._dropped = self._dropped - self._ids.keys(), set()
        added, self._added = self._added & self._ids.keys(), set()
        if dropped and pubsub.subscribed:
            await pubsub.unsubscribe(*dropped)
        if added:
            await pubsub.subscribe(*added)
            self._subscribed.set()
            await self._read(client, added)

    async def _read(self, client: redis.asyncio.Redis, channels: Iterable[str]) -> None:
        keys = list(channels)
        if keys:
            for key, stored in zip(keys, await client.mget(keys), strict=True):
                self._report(key, stored)

    async def _listen(self, pubsub: Any) -> None:
        while True:
            if not pubsub.subscribed:
                self._subscribed.clear()
                await self._subscribed.wait()
            message = await pubsub.get_message(timeout=None)
            if message is not None and message["type"] == "message":
                self._report(_text(message["channel"]), message["data"])

    def _report(self, channel: str, stored: Any) -> None:
        task_id = self._ids.get(channel)
        if task_id is None or not stored:
            return
        try:
            record = self._backend.decode(stored)
            status = record["status"]
        except Exception as exc:
            # Whoever waits must learn of it: nothing better will be stored.
            self._resolve(task_id, _unreadable(task_id, exc))
            return
        if status is not None:
            self._resolve(task_id, record)


class PolledSource:
    """Asks the backend for each waiting task, ``interval`` seconds apart."""

    #: As ``RedisSource.sending``; here Celery's backend has to prepare each answer.
    sending: ClassVar[dict[str, Any]] = {}

    def __init__(self, app: Any, resolve: Resolve, interval: float) -> None:
        self._app = app
        self._resolve = resolve
        self._interval = interval
        self._ids: dict[str, None] = {}
        self._life: asyncio.Task[None] | None = None
        self.owns_reply_queue = isinstance(app.backend, celery.backends.rpc.RPCBackend)

    def watch(self, task_id: str) -> None:
        self._ids[task_id] = None
        if self._life is None:
            self._life = asyncio.create_task(self._live())

    def forget(self, task_id: str) -> None:
        self._ids.pop(task_id, None)

    async def _live(self) -> None:
        # The thread is the watcher's own: a backend that blocks delays answers, nothing else.
        while self._ids:
            for task_id in list(self._ids):
                self._ask(task_id)
                await asyncio.sleep(0)
            await asyncio.sleep(self._interval)
        self._life = None

    def _ask(self, task_id: str) -> None:
        try:
            # Looked up here: backends belong to threads, and so do the queues of RPC's answers.
            self._resolve(task_id, self._app.backend.get_task_meta(task_id))
        except Exception:
            logger.exception("cannot read the result of %s, asking again", task_id)


def _unreadable(task_id: str, exc: Exception) -> errors.SerializationError:
    error = errors.SerializationError(
        f"the answer of {task_id} cannot be read: {exc}; are its types registered here, too?"
    )
    error.__cause__ = exc
    return error


def _client(backend: Any) -> redis.asyncio.Redis:
    """An asynchronous client for the server of Celery's Redis result backend."""
    options = {key: value for key, value in backend.connparams.items() if value is not None}
    for sync_only in ("max_connections", "retry", "retry_on_timeout", "driver_info"):
        options.pop(sync_only, None)
    cls = options.pop("connection_class", redis.Connection)
    options["connection_class"] = getattr(redis.asyncio, cls.__name__, redis.asyncio.Connection)
    options.pop("socket_timeout", None)  # a subscription is silent for as long as nothing ends
    return redis.asyncio.Redis(connection_pool=redis.asyncio.ConnectionPool(**options))


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
