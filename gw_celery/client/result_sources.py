"""Where a watcher learns that tasks have finished: notifications from Redis, or asking."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import redis.asyncio
import redis.exceptions
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.backends.rpc import RPCBackend

from gw_celery import conf
from gw_celery.client import polled
from gw_celery.policy import backoff
from gw_celery.transport import client as transport_client

logger = logging.getLogger(__name__)

#: Seconds after which the records of all waiting calls are read again, in case a notification
#: was lost with its connection.
SWEEP = 5.0
#: Seconds in which the server answers, or it counts as lost. Not the client's own time-out: a
#: subscription is silent for as long as nothing ends.
ANSWER_TIMEOUT = 5.0
_LOST = (OSError, redis.exceptions.RedisError)


def of(app: Any, resolve: polled.Resolve, settings: conf.Settings) -> Source:
    """Return the source for ``app``; ``resolve(task_id, record)`` is called on its loop."""
    # A replica of the GPU pool has a subclass. Sentinels would have to be asked for the server.
    if isinstance(app.backend, RedisBackend) and not isinstance(app.backend, SentinelBackend):
        return RedisSource(app.backend, resolve)
    is_rpc = isinstance(app.backend, RPCBackend)
    source = polled.RpcSource if is_rpc else polled.PolledSource
    return source(app, resolve, settings.poll_interval)


class RedisSource:
    """One subscription connection and one for reading, on the loop of the watcher."""

    sending = polled.UNPREPARED

    def __init__(self, backend: Any, resolve: polled.Resolve) -> None:
        self._backend = backend
        self._resolve = resolve
        self._ids: dict[str, str] = {}  # channel, which is the key, too -> task id
        self._added: set[str] = set()
        self._dropped: set[str] = set()
        self._changed = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._backoff = backoff.Backoff(polled.FIRST_DELAY, polled.LONGEST_DELAY)
        self._life: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Called before each sending, on the thread that sends."""

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
        while True:
            try:
                async with transport_client.of(self._backend, socket_timeout=None) as client:
                    await self._follow(client)
            except* Exception as lost:
                # Whatever it is: nobody else would answer those who wait.
                await asyncio.sleep(self._logged(lost.exceptions[0]))

    def _logged(self, exc: Exception) -> float:
        delay = self._backoff.next()
        traceback = None if isinstance(exc, _LOST) else exc
        logger.warning(
            "lost the result backend, again in %.1f s: %r", delay, exc, exc_info=traceback
        )
        return delay

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
                self._report(_text(message["channel"]), message["data"])

    def _report(self, channel: str, stored: Any) -> None:
        task_id = self._ids.get(channel)
        if task_id is None or not stored:
            return
        try:
            record = self._backend.decode(stored)
            status = record["status"]
        except Exception as exc:
            self._resolve(task_id, polled.unreadable(task_id, exc))
            return
        if status is not None:
            self._resolve(task_id, record)


Source = RedisSource | polled.PolledSource


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
