"""Result backends that do not block the event loop.

An app names its backend's class beside the address of the server; each process of the pool names
one of these before its first result. Redis gets grouped, non-blocking writes; every other backend
threads.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from celery.app import backends
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError

from gw_celery.client import execution
from gw_celery.protocol import frames
from gw_celery.replica import input as replica_input
from gw_celery.runtime import greenlet_bridge
from gw_celery.transport import result_writer

#: Around the storing of a result: callbacks, errbacks and chords, which publish.
_STEPS = (
    "mark_as_done",
    "mark_as_failure",
    "mark_as_retry",
    "mark_as_started",
    "on_chord_part_return",
)
_BLOCKING = (*_STEPS, "get_task_meta", "store_result")


#: The class that this process uses; Celery imports it by name.
Installed: Any = None


def install(
    app: Any, around: Callable[..., Any], store_timeout: float, link: replica_input.Link
) -> None:
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
        Installed = grouped(off_loop(base, threads, _STEPS), store_timeout, link)
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
            if replica_input.is_benchmark() and name != "get_task_meta":
                return None
            return threads(getattr(super(made, self), name), *args, **kwargs)

        return write

    body = {name: moved(name) for name in names}
    made = type(base.__name__, (base,), body)
    return made


def grouped(base: Any, store_timeout: float, link: replica_input.Link) -> type:
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
            if replica_input.is_benchmark():
                return None
            return super().store_result(*args, **kwargs)

        def get(self, key: Any) -> Any:
            if not _reaches_loop():
                return super().get(key)
            return self._run("get", key)

        def set(self, key: Any, value: Any, expires: Any = None, **policy: Any) -> Any:
            if not _reaches_loop():
                named = policy if expires is None else {"expires": expires, **policy}
                return super().set(key, value, **named)  # Celery 5.6 knows no `expires`
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
            return result_writer.of(
                self,
                store_timeout,
                replica_input.others_in_flight,
                lambda reason: link.report(frames.Report.OUTAGE, reason),
            )

    Grouped.__name__ = base.__name__
    return Grouped


def _unless_given_up(write: Callable[[], Any]) -> Any:
    """Write, unless a write of the same tracer has been given up.

    Celery's tracer takes that for a failure of the task and would store it, with time of its own,
    in which the server may be back. The input goes back to the broker instead.
    """
    input = replica_input.current.get()
    if input is None or input.phase is replica_input.Phase.BODY:
        return write()
    if input.store_error is not None:
        raise input.store_error
    try:
        return write()
    except result_writer.LOST as exc:
        input.store_error = exc
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
