"""Result backends that do not block the event loop.

An app names its backend's class beside the address of the server; each process of the pool names
one of these before its first result. Redis gets grouped, non-blocking writes; every other backend
threads.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from celery.app import backends
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError

from gw_celery.client import execution
from gw_celery.replica import input as replica_input
from gw_celery.runtime import greenlet_bridge, offload
from gw_celery.transport import result_writer

_BLOCKING = (
    "get_task_meta",
    "store_result",
    "mark_as_done",
    "mark_as_failure",
    "mark_as_retry",
    "mark_as_started",
    "on_chord_part_return",
)


def _tell_nobody(reason: str) -> None: ...


#: The class that this process uses; Celery imports it by name.
Installed: Any = None


def install(
    app: Any,
    around: Callable[..., Any],
    store_timeout: float,
    on_outage: Callable[[str], None] = _tell_nobody,
) -> None:
    """Make ``app`` use them; before its backend is first asked for.

    Args:
        around: calls what it is given, with whatever must surround a write in a thread.
        store_timeout: seconds that a write to Redis is tried again when the server is away.
        on_outage: told on the loop why Redis is away, and ``""`` when it is back.
    """
    global Installed
    url = app.backend_cls or app.conf.result_backend
    if not isinstance(url, str):
        return
    base, address = backends.by_url(url, app.loader)
    Installed = off_loop(base, offload.Offload("store", 16, around))
    if base is RedisBackend:
        Installed = grouped(Installed, store_timeout, on_outage)
        # One client for all threads: redis-py's is made for that.
        app.conf.result_backend_thread_safe = True
    # A name and not the class: Celery takes the address of the server from the same string, and
    # Celery 5.6 knows nothing else.
    name = f"{__name__}:Installed"
    app.backend_cls = f"{name}+{address}" if address else name


def off_loop(base: type, threads: offload.Offload) -> type:
    """Return ``base`` with its reads and writes in a thread while the tracer's greenlet waits."""

    def moved(name: str) -> Callable[..., Any]:
        def write(self: Any, *args: Any, **kwargs: Any) -> Any:
            if replica_input.is_unseen() and name != "get_task_meta":
                return None
            return threads(getattr(super(made, self), name), *args, **kwargs)

        return write

    body = {name: moved(name) for name in _BLOCKING}
    made = type(base.__name__, (base,), body)
    return made


def grouped(
    base: Any, store_timeout: float, on_outage: Callable[[str], None] = _tell_nobody
) -> type:
    """Return a Redis backend that reads and writes from the loop, many results at a time.

    From threads, too: what they store then waits for a server that is away as the rest does.
    """

    class Grouped(base):
        def mark_as_done(
            self, task_id: str, result: Any, request: Any = None, *rest: Any, **named: Any
        ) -> Any:
            if not greenlet_bridge.can_park() or (request and request.chord):
                return super().mark_as_done(task_id, result, request, *rest, **named)
            return RedisBackend.mark_as_done(self, task_id, result, request, *rest, **named)

        def store_result(self, *args: Any, **kwargs: Any) -> Any:
            if replica_input.is_unseen():
                return None
            return RedisBackend.store_result(self, *args, **kwargs)

        def get_task_meta(self, *args: Any, **kwargs: Any) -> Any:
            return RedisBackend.get_task_meta(self, *args, **kwargs)

        def get(self, key: Any) -> Any:
            if not _reaches_loop():
                return super().get(key)
            return self._run("get", key)

        def set(self, key: Any, value: Any, expires: Any = None, **policy: Any) -> Any:
            if not _reaches_loop():
                given = policy if expires is None else {"expires": expires, **policy}
                return super().set(key, value, **given)  # Celery 5.6 knows no `expires`
            if isinstance(value, str) and len(value) > self._MAX_STR_VALUE_SIZE:
                # The server would close the connection, and fail all that share it.
                raise BackendStoreError(f"a result of {len(value)} characters is too large")
            lifetime = self.expires if expires is None else expires
            return self._run("set", key, value, lifetime)

        def _run(self, *command: Any) -> Any:
            return _unless_given_up(lambda: _await(self._writer.run(*command)))

        async def command(self, *command: Any) -> Any:
            """Send one command together with the results that are ready; see ``Writer.run``."""
            return await self._writer.run(*command)

        @functools.cached_property
        def _writer(self) -> result_writer.Writer:
            return result_writer.of(self, store_timeout, replica_input.has_company, on_outage)

    Grouped.__name__ = base.__name__
    return Grouped


def _unless_given_up(write: Callable[[], Any]) -> Any:
    """Write, unless a write of the same tracer has been given up.

    Celery's tracer takes that for a failure of the task and would store it, with time of its own,
    in which the server may be back. The input goes back to the broker instead.
    """
    one = replica_input.current.get()
    if one is None or one.is_in_body:
        return write()
    if one.store_error is not None:
        raise one.store_error
    try:
        return write()
    except result_writer.LOST as exc:
        one.store_error = exc
        raise


def _reaches_loop() -> bool:
    """Whether the caller can wait for the loop of this process: it is not what blocks it."""
    if greenlet_bridge.can_park():
        return True
    serving = execution.current()
    return serving is not None and not serving.is_on_loop()


def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    serving = execution.current()
    if greenlet_bridge.can_park() or serving is None:
        return greenlet_bridge.drive(coroutine)
    return asyncio.run_coroutine_threadsafe(coroutine, serving.loop).result()
