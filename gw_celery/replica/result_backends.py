"""Result backends that do not block the event loop.

An app names its backend's class beside the address of the server; each process of the pool names
one of these before its first result. Redis gets grouped, non-blocking writes; every other backend
threads.
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

#: What publishes besides: errbacks and chords.
_PUBLISHING = ("mark_as_failure", "on_chord_part_return")
_BLOCKING = (
    *_PUBLISHING,
    "mark_as_done",
    "mark_as_retry",
    "mark_as_started",
    "get_task_meta",
    "store_result",
)
#: What a server that is away raises.
_LOST = (OSError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
#: Seconds until a server that is away is asked again.
PAUSE = 1.0
#: What a result may wait for others, in seconds, while other inputs are in flight.
_LINGER = 0.005
#: A server that is silent for so long counts as lost.
_SOCKET_TIMEOUT = 5.0
_LONGEST_REASON = 200

#: The class that this process uses; Celery imports it by name.
Installed: Any = None


def install(app: Any, around: Callable[..., Any], store_timeout: float, link: tracer.Link) -> None:
    """Make ``app`` use them; before its backend is first asked for.

    Args:
        app: the Celery app.
        around: calls what it is given, with whatever must surround a write in a thread.
        store_timeout: seconds that a write to Redis is tried again when the server is away.
        link: the way to the parent, which is told that Redis is away, or back.
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
        # One client for all threads: redis-py's is made for that.
        app.conf.result_backend_thread_safe = True
    # A name and not the class: Celery takes the address of the server from the same string, and
    # Celery 5.6 knows nothing else.
    name = f"{__name__}:Installed"
    app.backend_cls = f"{name}+{address}" if address else name


def off_loop(
    base: type, threads: greenlet_bridge.Offload, names: Iterable[str] = _BLOCKING
) -> type:
    """Return ``base`` with its reads and writes in a thread while the tracer's greenlet waits."""

    def moved(name: str) -> Callable[..., Any]:
        def write(self: Any, *args: Any, **kwargs: Any) -> Any:
            if tracer.is_benchmark() and name != "get_task_meta":
                return None
            return threads(getattr(super(made, self), name), *args, **kwargs)

        return write

    made = type(base.__name__, (base,), {name: moved(name) for name in names})
    return made


def grouped(base: Any, store_timeout: float, link: tracer.Link) -> type:
    """Return a Redis backend that reads and writes from the loop, many results at a time.

    From threads, too: what they store then waits for a server that is away as the rest does.
    """

    class Grouped(base):
        def store_result(self, *args: Any, **kwargs: Any) -> Any:
            return None if tracer.is_benchmark() else super().store_result(*args, **kwargs)

        def get(self, key: Any) -> Any:
            return self._run("get", key) if _reaches_loop() else super().get(key)

        def set(self, key: Any, value: Any, expires: Any = None, **policy: Any) -> Any:
            if not _reaches_loop():
                named = policy if expires is None else {"expires": expires, **policy}
                return super().set(key, value, **named)  # Celery 5.6 knows no `expires`
            if isinstance(value, str) and len(value) > self._MAX_STR_VALUE_SIZE:
                # The server would close the connection, and fail all that share it.
                raise BackendStoreError(
                    f"a result of {len(value)} characters is too large: Redis takes "
                    f"{self._MAX_STR_VALUE_SIZE}; return a reference to the data"
                )
            return self._run("set", key, value, self.expires if expires is None else expires)

        def _run(self, *command: Any) -> Any:
            """Run a command, unless one of the same tracer has been given up.

            Celery's tracer takes that for a failure of the task and would store it, with time of
            its own, in which the server may be back. The input goes back to the broker instead.
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
            """Send one command together with the results that are ready; see ``Writer.run``."""
            return await self._writer.run(*command)

        @functools.cached_property
        def _writer(self) -> Writer:
            client = find.async_client(self, socket_timeout=_SOCKET_TIMEOUT)
            return Writer(client, store_timeout, link)

    Grouped.__name__ = base.__name__
    return Grouped


def _reaches_loop() -> bool:
    """Whether the caller can wait for the loop of this process: it is not what blocks it."""
    if greenlet_bridge.can_park():
        return True
    serving = execution.current()
    return serving is not None and not serving.is_on_loop()


class Writer:
    """Reads and writes of Redis results on the running loop, gathered into pipelines.

    What becomes ready while one pipeline is on its way goes into the next one: with many inputs in
    flight a round trip is shared, with one alone nothing waits. Commands are answered in the order
    in which they came.

    An outage of the server begins with a command that was lost with the connection, and ends when
    the server answers anything: a command that is tried again or, when all of them were given up, a
    PING.

    Args:
        client: talks to the server; this writer's alone.
        store_timeout: seconds that commands are tried again while the server is away.
        link: the way to the parent, which is told why the server is away, and ``""`` when it is
            back.
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
                # Each answer is read first, and those that are read together are set together.
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
        """Ask the server for a sign of life: nothing is left that would show that it is back."""
        await asyncio.sleep(PAUSE)
        try:
            await self._client.ping()
        except _LOST:
            return
        except Exception as exc:  # an answer, too
            logger.debug("the result backend answers: %r", exc)
        self._note_outage("")

    def _note_outage(self, reason: str) -> None:
        """Report that the server went away, and why, or with ``""`` that it is back."""
        if bool(reason) != self._is_away:
            self._is_away = bool(reason)
            self._link.report(frames.Report.OUTAGE, reason[:_LONGEST_REASON])

    async def _execute(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send commands together, again and again while the server is away."""
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
                if name == "set":  # those who wait for the result are told
                    pipe.publish(*arguments[:2])
            answers = await pipe.execute(raise_on_error=False)
        return list(answers[: len(commands)])


class EarlyAckRecords:
    """What inputs that are acknowledged when they begin leave in Redis while they run.

    It travels in the pipelines of the results.

    Args:
        app: the Celery app, whose backend groups what it writes.
        worker: the start of the worker, by which its records are kept.
    """

    def __init__(self, app: Any, worker: str) -> None:
        self._backend = app.backend
        self._key = early_acks.records_key(app.backend, worker)
        self._tasks = loop.Tasks()

    async def begin(self, input: tracer.Input, arguments: Any) -> None:
        """Record an input that is about to start; without Redis it starts all the same."""
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
        """Have the record of an input removed soon."""
        self._tasks.start(self._remove(input), f"record of input {input.number}")

    async def _remove(self, input: tracer.Input) -> None:
        try:
            await self._backend.command("hdel", self._key, str(input.number))
        except Exception as exc:  # its result is there, too
            logger.warning("the record of task %s[%s] stays: %r", input.name, input.task_id, exc)
