"""Result backends for a child that do not block its event loop.

An app's backend URL also names the backend's class. Each child replaces this name before its first
result. Redis gets grouped, non-blocking writes; every other backend gets threads.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import redis.asyncio
import redis.exceptions
from celery.app import backends
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError

from gw_celery import errors
from gw_celery.client import execution
from gw_celery.cluster import early_acks
from gw_celery.protocol import frames
from gw_celery.replica import tracer
from gw_celery.runtime import greenlet_bridge, loop
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: Methods that also publish, for errbacks and chords.
_PUBLISHING = ("mark_as_failure", "on_chord_part_return")
_BLOCKING = (
    *_PUBLISHING,
    "mark_as_done",
    "mark_as_retry",
    "mark_as_started",
    "get_task_meta",
    "store_result",
)
#: Exceptions that an unreachable server causes.
_LOST = (OSError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
#: Seconds between two attempts to reach such a server.
PAUSE = 1.0
#: Seconds that a result may wait for others, while other inputs are in flight.
_LINGER = 0.005
#: Seconds after which a silent server counts as lost.
_SOCKET_TIMEOUT = 5.0
_LONGEST_REASON = 200

#: The backend class of this process; Celery imports it by this name.
Installed: Any = None


def install(app: Any, around: Callable[..., Any], store_timeout: float, link: tracer.Link) -> None:
    """Make ``app`` use our result backend, before it creates its own.

    Args:
        app: the Celery app.
        around: calls a function, with the setup that a thread needs.
        store_timeout: seconds for which a write to an unreachable Redis is retried.
        link: the connection to the parent, which gets reports of outages.
    """
    global Installed
    url = app.backend_cls or app.conf.result_backend
    if not isinstance(url, str):
        return
    base, address = backends.by_url(url, app.loader)
    threads = greenlet_bridge.Offload("store", 16, around)
    if base is not RedisBackend:
        Installed = off_loop(base, threads)
    else:
        Installed = grouped(off_loop(base, threads, _PUBLISHING), store_timeout, link)
        # One client for all threads, which redis-py supports.
        app.conf.result_backend_thread_safe = True
    # A name instead of the class: Celery reads the server's address from the same string, and
    # Celery 5.6 accepts nothing else.
    name = f"{__name__}:Installed"
    app.backend_cls = f"{name}+{address}" if address else name


def off_loop(
    base: type, threads: greenlet_bridge.Offload, names: Iterable[str] = _BLOCKING
) -> type:
    """Return a subclass of ``base`` that reads and writes in threads while the tracer waits."""

    def moved(name: str) -> Callable[..., Any]:
        def write(self: Any, *args: Any, **kwargs: Any) -> Any:
            if tracer.is_benchmark() and name != "get_task_meta":
                return None
            return threads(getattr(super(made, self), name), *args, **kwargs)

        return write

    made = type(base.__name__, (bounded(base),), {name: moved(name) for name in names})
    return made


def bounded(base: Any) -> type:
    """Return a subclass of ``base`` that cuts the texts of the errors that it stores."""

    class Bounded(base):
        def prepare_exception(self, exc: Any, serializer: Any = None) -> Any:
            prepared = super().prepare_exception(exc, serializer)
            if isinstance(prepared, dict):  # a serializer such as pickle gets the exception
                prepared["exc_message"] = errors.cut_arguments(prepared["exc_message"])
            return prepared

        def store_result(
            self, task_id: str, result: Any, state: str, traceback: Any = None, **kwargs: Any
        ) -> Any:
            if isinstance(traceback, str):
                traceback = errors.cut_traceback(traceback)
            return super().store_result(task_id, result, state, traceback, **kwargs)

    return Bounded


def grouped(base: Any, store_timeout: float, link: tracer.Link) -> type:
    """Return a Redis backend that reads and writes on the loop, many results at a time.

    Threads use the loop too, so that their results wait for an unreachable server in the same way.
    """

    class Grouped(base):
        def store_result(self, *args: Any, **kwargs: Any) -> Any:
            return None if tracer.is_benchmark() else super().store_result(*args, **kwargs)

        def get(self, key: Any) -> Any:
            return self._run("get", key) if _reaches_loop() else super().get(key)

        def set(self, key: Any, value: Any, expires: Any = None, **policy: Any) -> Any:
            if not _reaches_loop():
                named = policy if expires is None else {"expires": expires, **policy}
                return super().set(key, value, **named)  # Celery 5.6 has no `expires`
            if isinstance(value, str) and len(value) > self._MAX_STR_VALUE_SIZE:
                # The server would close the connection, and all commands on it would fail.
                raise BackendStoreError(
                    f"a result of {len(value)} characters is too large: Redis takes "
                    f"{self._MAX_STR_VALUE_SIZE}; return a reference to the data"
                )
            return self._run("set", key, value, self.expires if expires is None else expires)

        def _run(self, *command: Any) -> Any:
            """Run a command, unless an earlier one of the same tracer was given up.

            Celery's tracer takes a failed write for a failure of the task, and would store that
            with a new timeout, within which the server may return. The input must go back to the
            broker.
            """
            input = tracer.current.get()
            if input is not None and input.phase is tracer.Phase.BODY:
                input = None
            if input is not None and input.store_error is not None:
                raise input.store_error
            coroutine, serving = self.command(*command), execution.current()
            try:
                if greenlet_bridge.can_park() or serving is None:
                    return greenlet_bridge.drive(coroutine)
                return asyncio.run_coroutine_threadsafe(coroutine, serving.loop).result()
            except _LOST as exc:
                if input is not None:
                    input.store_error = exc
                raise

        async def command(self, *command: Any) -> Any:
            """Send one command together with other ready ones; see ``Writer.run``."""
            return await self._writer.run(*command)

        @functools.cached_property
        def _writer(self) -> Writer:
            client = find.async_client(self, socket_timeout=_SOCKET_TIMEOUT)
            return Writer(client, store_timeout, link)

    Grouped.__name__ = base.__name__
    return Grouped


def _reaches_loop() -> bool:
    """Return whether the caller can wait for the loop without blocking it."""
    if greenlet_bridge.can_park():
        return True
    serving = execution.current()
    return serving is not None and not serving.is_on_loop()


class Writer:
    """Reads and writes Redis results on the running loop, grouped into pipelines.

    Commands that arrive while a pipeline is in progress form the next one: many inputs in flight
    share a round trip, and a single one never waits. Answers keep the order of the commands.

    An outage begins with a command that was lost with the connection. It ends when the server
    answers anything: a retried command or, if all were given up, a PING.

    Args:
        client: a client that only this writer uses.
        store_timeout: seconds for which commands are retried while the server is unreachable.
        link: the connection to the parent, which gets the reason of an outage, and ``""`` at its
            end.
    """

    def __init__(
        self, client: redis.asyncio.Redis, store_timeout: float, link: tracer.Link
    ) -> None:
        self._client = client
        self._store_timeout = store_timeout
        self._link = link
        self._is_away = False
        self._pending: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    async def run(self, *command: Any) -> Any:
        """Return the answer to ``("get", key)`` or ``("set", key, value, lifetime)``.

        ``("hset", key, field, value)`` and ``("hdel", key, field)`` are supported too.

        Raises:
            redis.exceptions.ConnectionError: if the server was unreachable for ``store_timeout``.
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
                # Storing a result begins with a get: results read together are written together.
                starts = all(command[0] in ("get", "hdel") for command, _ in self._pending)
                if starts and len(tracer.in_flight) > 1:
                    await asyncio.sleep(_LINGER)
                group, self._pending = self._pending, []
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
        finally:
            self._task = None

    async def _ping(self) -> None:
        """Check whether the server is back, because no command is left that would show it."""
        await asyncio.sleep(PAUSE)
        try:
            await self._client.ping()
        except _LOST:
            return
        except Exception as exc:  # an error is an answer too
            logger.debug("the result backend answers: %r", exc)
        self._note_outage("")

    def _note_outage(self, reason: str) -> None:
        """Report the reason of an outage, or with ``""`` its end."""
        if bool(reason) != self._is_away:
            self._is_away = bool(reason)
            self._link.report(frames.Report.OUTAGE, reason[:_LONGEST_REASON])

    async def _execute(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send commands together, and retry while the server is unreachable."""
        now = asyncio.get_running_loop().time
        end = now() + self._store_timeout
        while True:
            try:
                answers = await self._pipeline(commands)
            except _LOST as lost:
                self._note_outage(f"{type(lost).__name__}: {lost}")
                if now() >= end:
                    raise
                logger.warning(
                    "pid %d: %d commands wait for the result backend: %r; next try in %.0f s",
                    *(os.getpid(), len(commands), lost, PAUSE),
                )
                await asyncio.sleep(PAUSE)
            else:
                self._note_outage("")
                return answers

    async def _pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for name, *arguments in commands:
                if name == "set":
                    key, value, lifetime = arguments
                    pipe.set(key, value, ex=lifetime or None)
                else:
                    getattr(pipe, name)(*arguments)
            for name, *arguments in commands:
                if name == "set":  # notify the callers that wait for the result
                    pipe.publish(*arguments[:2])
            answers = await pipe.execute(raise_on_error=False)
        return list(answers[: len(commands)])


class EarlyAckRecords:
    """Records of running, early acknowledged inputs, which the result pipelines write to Redis.

    Args:
        app: the Celery app, with our grouping result backend.
        worker: the start id of the worker, under which the records are kept.
    """

    def __init__(self, app: Any, worker: str) -> None:
        self._backend = app.backend
        self._key = early_acks.records_key(app.backend, worker)
        self._tasks = loop.Tasks()

    async def begin(self, input: tracer.Input, arguments: Any) -> None:
        """Record an input that is about to start; without Redis, it starts unrecorded."""
        embed = arguments[2] if len(arguments) > 2 else None
        try:
            record = early_acks.write(input.request, embed)
        except errors.SerializationError as exc:
            logger.warning(
                "task %s[%s] has callbacks that cannot be recorded: %s",
                *(input.name, input.task_id, exc),
            )
            record = early_acks.write(input.request, None)
        try:
            await self._backend.command("hset", self._key, str(input.number), record)
        except Exception as exc:
            logger.warning(
                "task %s[%s] starts without a record, and has no answer if its worker is lost: %r",
                *(input.name, input.task_id, exc),
            )

    def end(self, input: tracer.Input) -> None:
        self._tasks.start(self._remove(input), f"record of input {input.number}")

    async def _remove(self, input: tracer.Input) -> None:
        try:
            await self._backend.command("hdel", self._key, str(input.number))
        except Exception as exc:  # its result is stored, so that the record does no harm
            logger.warning("the record of task %s[%s] stays: %r", input.name, input.task_id, exc)
