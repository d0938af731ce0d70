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
from celery.backends.redis import RedisBackend
from redis.exceptions import NoScriptError

from gw_celery import background_thread, errors
from gw_celery.client import execution
from gw_celery.cluster import early_acks, fence
from gw_celery.protocol import frames
from gw_celery.replica import outcomes, tracer
from gw_celery.runtime import greenlet_bridge, loop
from gw_celery.transport import find, refusals

logger = logging.getLogger(__name__)

#: Methods that also publish, for errbacks and chords.
_PUBLISHING = ("mark_as_failure", "on_chord_part_return")
_BLOCKING = (
    *_PUBLISHING,
    *("mark_as_done", "mark_as_retry", "mark_as_started", "get_task_meta", "store_result"),
    *("apply_chord", "save_group", "restore_group", "delete_group", "forget"),
)
#: Commands that begin an exchange: those that are sent together end together.
_FIRST = ("get", "store", "hdel")
#: Commands that a server answers which refuses to write.
_READS = ("get", "exists")
#: Seconds that a result may wait for others, while other inputs are in flight.
_LINGER = 0.005
#: Seconds after which a silent server counts as lost.
_SOCKET_TIMEOUT = 5.0


def install(app: Any, around: Callable[..., Any], store_timeout: float, link: tracer.Link) -> None:
    """Make ``app`` use our result backend in place of its own.

    Args:
        app: the Celery app.
        around: calls a function, with the setup that a thread needs.
        store_timeout: seconds for which a write to a Redis that is away is retried.
        link: the connection to the parent, which gets reports of outages.
    """

    def derive(base: Any) -> Any:
        threads, fenced = greenlet_bridge.Offload("store", 16, around), fence.fenced(base)
        if base is not RedisBackend:
            return off_loop(fenced, threads, (*_BLOCKING, "require_alive"))
        # One client for all threads, which redis-py supports.
        app.conf.result_backend_thread_safe = True
        return grouped(off_loop(fenced, threads, _PUBLISHING), store_timeout, link)

    fence.install(app, derive)


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

    made = type(base.__name__, (outcomes.Outcomes, base), {name: moved(name) for name in names})
    return made


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
            self.require_room(value)
            return self._run("set", key, value, self.expires if expires is None else expires)

        def run_script(self, *arguments: Any) -> Any:
            if _reaches_loop():
                return self._run("store", *arguments)
            return super().run_script(*arguments)

        def exists(self, key: str) -> Any:
            return self._run("exists", key) if _reaches_loop() else super().exists(key)

        def _run(self, *command: Any) -> Any:
            """Run a command, unless an earlier one of the same tracer was given up.

            Celery's tracer takes a failed write for a failure of the task, and would store that
            with a new timeout, within which the server may return. The input must go back to the
            broker.
            """
            input = tracer.current.get()
            is_body = input is not None and input.phase is tracer.Phase.BODY
            if is_body and command[0] != "exists":  # asked by Celery's retry, not by the body
                input = None
            if input is not None and input.store_error is not None:
                raise input.store_error
            coroutine, serving = self.command(*command), execution.current()
            try:
                if greenlet_bridge.can_park() or serving is None:
                    return greenlet_bridge.drive(coroutine)
                return asyncio.run_coroutine_threadsafe(coroutine, serving.loop).result()
            except Exception as exc:
                if input is not None and refusals.is_outage(exc):
                    input.store_error = exc
                raise

        async def command(self, *command: Any) -> Any:
            """Send one command together with other ready ones; see ``Writer.run``."""
            return await self._writer.run(*command)

        @functools.cached_property
        def _writer(self) -> Writer:
            client = find.async_client(self, socket_timeout=_SOCKET_TIMEOUT)
            return Writer(client, store_timeout, link, fence.probe_of(self))

    Grouped.__name__ = base.__name__
    return Grouped


#: A command, and the future of its answer.
_Waiting = tuple[tuple[Any, ...], "asyncio.Future[Any]"]


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

    An outage begins with a command that was lost with the connection, or that the server refused
    for now. It ends when the server writes: a retried command or, if all were given up, a probe.

    Args:
        client: a client that only this writer uses.
        store_timeout: seconds for which commands are retried during an outage.
        link: the connection to the parent, which gets the reason of an outage, and ``""`` at its
            end.
        probe: arguments of a "store" that has no effect.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        store_timeout: float,
        link: tracer.Link,
        probe: tuple[Any, ...],
    ) -> None:
        self._client = client
        self._store_timeout = store_timeout
        self._link = link
        self._probe = ("store", *probe)
        self._is_away = False
        self._log = background_thread.Outage(logger, f"pid {os.getpid()}: results cannot be stored")
        self._pending: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def run(self, *command: Any) -> Any:
        """Return the answer to ``("get", key)`` or ``("set", key, value, lifetime)``.

        ``("store", <arguments of the fence's script>)``, ``("exists", key)``, ``("hset", key,
        field, value)`` and ``("hdel", key, field)`` are supported too.

        Raises:
            redis.exceptions.RedisError: the reason, if the server was away for ``store_timeout``.
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
                    await asyncio.sleep(fence.PAUSE)
                    unread: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                    unread.cancel()
                    await self._attempt([(self._probe, unread)])
                    continue
                starts = all(command[0] in _FIRST for command, _ in self._pending)
                if starts and len(tracer.in_flight) > 1:
                    await asyncio.sleep(_LINGER)
                group, self._pending = self._pending, []
                await self._execute(group)
        finally:
            self._task = None

    async def _execute(self, group: list[_Waiting]) -> None:
        """Send commands together, and retry those that an outage affects."""
        now = asyncio.get_running_loop().time
        end = now() + self._store_timeout
        while (refused := await self._attempt(group)) and now() < end:
            group = [waiting for waiting, _ in refused]
            await asyncio.sleep(fence.PAUSE)
        for (_, waiting), reason in refused:
            if not waiting.done():
                waiting.set_exception(reason)

    async def _attempt(self, group: list[_Waiting]) -> list[tuple[_Waiting, Exception]]:
        """Send commands once, resolve the answered ones, and return the others with the reason."""
        commands = [command for command, _ in group]
        answers: list[Any]
        try:
            answers = await self._pipeline(commands)
        except Exception as exc:
            answers = [exc] * len(group)
        refused, has_written = [], False
        for (command, waiting), answer in zip(group, answers, strict=True):
            if isinstance(answer, Exception) and refusals.is_outage(answer):
                refused.append(((command, waiting), answer))
                continue
            has_written |= command[0] not in _READS
            if waiting.done():
                continue
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)
        if refused:
            self._note_outage(refused[0][1])
        elif has_written:
            self._note_outage(None)
        return refused

    def _note_outage(self, reason: Exception | None) -> None:
        """Log and report the beginning of an outage, or with ``None`` its end."""
        if (reason is not None) == self._is_away:
            return
        self._is_away = reason is not None
        if reason is None:
            self._log.end()
        else:
            self._log.begin(reason)
        text = "" if reason is None else errors.titled(reason)
        self._link.report(frames.Report.OUTAGE, text)

    async def _pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        answers = await self._send(commands)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            # A restarted server has forgotten the script, and learns it with EVAL. Those that were
            # stored are stored again, which changes nothing.
            answers = await self._send(commands, is_new=True)
        return answers

    async def _send(self, commands: list[tuple[Any, ...]], *, is_new: bool = False) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for name, *arguments in commands:
                if name == "set":
                    key, value, lifetime = arguments
                    pipe.set(key, value, ex=lifetime or None)
                elif name == "store":
                    run = pipe.eval if is_new else pipe.evalsha
                    run(fence.STORE if is_new else fence.SHA, *arguments)
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
        write = ("hset", self._key, str(input.number), record)
        try:
            try:
                await self._backend.command(*write)
            except Exception as exc:
                if not refusals.is_wrong_type(exc):
                    raise
                await self._backend.command("delete", self._key)  # it is ours
                await self._backend.command(*write)
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
