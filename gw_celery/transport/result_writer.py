"""Reads and writes of Redis results from the event loop, gathered into pipelines.

What becomes ready while one pipeline is on its way goes into the next one: with many inputs in
flight a round trip is shared, with one alone nothing waits.

An outage of the server begins with a command that was lost with the connection, and ends when the
server answers anything: a command that is tried again or, when all of them were given up, a PING.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import redis.asyncio
import redis.exceptions

from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: What a server that is away raises.
LOST = (OSError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
_PAUSE = 1.0
#: What a result may wait for others, in seconds, while other inputs are in flight.
_LINGER = 0.005
#: A server that is silent for so long counts as lost.
_SOCKET_TIMEOUT = 5.0
_LONGEST_REASON = 200


class Writer:
    """One client on the running loop; commands are answered in the order in which they came.

    Args:
        client: talks to the server; this writer's alone.
        store_timeout: seconds that commands are tried again while the server is away.
        others_in_flight: whether other inputs are in flight, for which it is worth to linger.
        on_outage: told why when the server goes away, and ``""`` when it is back.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        store_timeout: float,
        others_in_flight: Callable[[], bool] = lambda: False,
        on_outage: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._client = client
        self._store_timeout = store_timeout
        self._others_in_flight = others_in_flight
        self._on_outage = on_outage
        self._is_away = False
        self._pending: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    async def run(self, *command: Any) -> Any:
        """Return the answer to ``("get", key)`` or ``("set", key, value, lifetime)``.

        Or to ``("hset", key, field, value)`` or ``("hdel", key, field)``.

        Raises:
            redis.exceptions.ConnectionError: when the server was away for ``store_timeout``.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending.append((command, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._write_all())
        return await answer

    async def _write_all(self) -> None:
        try:
            while self._pending or self._is_away:
                if not self._pending:
                    await self._ping()
                    continue
                await self._linger()
                group, self._pending = self._pending, []
                await self._write(group)
        finally:
            self._task = None

    async def _ping(self) -> None:
        """Ask the server for a sign of life: nothing is left that would show that it is back."""
        await asyncio.sleep(_PAUSE)
        try:
            await self._client.ping()
        except LOST:
            return
        except Exception as exc:  # an answer, too
            logger.debug("the result backend answers: %r", exc)
        self._is_back()

    def _is_lost(self, exc: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            self._on_outage(f"{type(exc).__name__}: {exc}"[:_LONGEST_REASON])

    def _is_back(self) -> None:
        if self._is_away:
            self._is_away = False
            self._on_outage("")

    async def _linger(self) -> None:
        """Let more answers gather; each is read first, and those that are read are set together."""
        starts = all(command[0] in ("get", "hdel") for command, _ in self._pending)
        if starts and self._others_in_flight():
            await asyncio.sleep(_LINGER)

    async def _write(self, group: list[tuple[tuple[Any, ...], asyncio.Future[Any]]]) -> None:
        answers: list[Any]
        try:
            answers = await self._execute([command for command, _ in group])
        except Exception as exc:
            answers = [exc] * len(group)
        for (_, waiting), answer in zip(group, answers, strict=True):
            if waiting.done():
                continue
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)

    async def _execute(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._store_timeout
        while True:
            try:
                answers = await self._pipeline(commands)
            except LOST as lost:
                self._is_lost(lost)
                if loop.time() >= end:
                    raise
                logger.warning(
                    "%d results wait for the result backend, again in %.0f s: %r",
                    len(commands),
                    _PAUSE,
                    lost,
                )
            else:
                self._is_back()
                return answers
            await asyncio.sleep(_PAUSE)

    async def _pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        is_answer: list[bool] = []
        async with self._client.pipeline(transaction=False) as pipe:
            for name, key, *rest in commands:
                is_answer.append(True)
                if name == "get":
                    pipe.get(key)
                elif name in ("hset", "hdel"):
                    getattr(pipe, name)(key, *rest)
                else:
                    value, lifetime = rest
                    pipe.set(key, value, ex=lifetime or None)
                    pipe.publish(key, value)
                    is_answer.append(False)
            answers = await pipe.execute(raise_on_error=False)
        return [answer for answer, counts in zip(answers, is_answer, strict=True) if counts]


def of(
    backend: Any,
    store_timeout: float,
    others_in_flight: Callable[[], bool],
    on_outage: Callable[[str], None],
) -> Writer:
    """Return a writer of its own for the results of ``backend``."""
    client = find.async_client(backend, socket_timeout=_SOCKET_TIMEOUT)
    return Writer(client, store_timeout, others_in_flight, on_outage)
