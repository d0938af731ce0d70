"""Wait for answers on event loops: one watcher per process for any number of calls.

The watcher is a thread with a loop of its own, because callers come from many loops (an ASGI
server's, one per ``async_to_sync``, scripts). With the Redis backend it holds one subscription
connection; any other backend is asked at intervals. Publishing is synchronous in Celery and may
block for as long as a broker is away, so it happens in a few threads, never on the caller's loop.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from celery import states

from gw_celery import conf, errors
from gw_celery.calling import outcome
from gw_celery.runtime import loop

T = TypeVar("T")
Meta = Mapping[str, Any]


class Watcher:
    """Resolves the answers that this process waits for, for one Celery app."""

    def __init__(self, app: Any) -> None:
        # Here: the Redis clients take half of the package's import time, and most processes
        # that import it never wait on an event loop.
        from gw_celery.calling import sources

        self.settings = conf.read(app.conf)
        self.pid = os.getpid()
        self._thread = loop.LoopThread("gw-watcher")
        self._source = sources.of(app, self._resolve, self.settings)
        self._waiting: dict[str, list[_Waiter]] = {}
        self._publishers = concurrent.futures.ThreadPoolExecutor(
            self.settings.publish_threads, thread_name_prefix="gw-publish"
        )
        self._thread.start()
        atexit.register(self.close)

    @property
    def sending(self) -> dict[str, Any]:
        """Options of ``apply_async`` for a call whose answer this watcher will wait for."""
        return self._source.sending

    def close(self) -> None:
        """End the watcher's threads; calls that still wait get no answer any more."""
        self._publishers.shutdown(wait=False, cancel_futures=True)
        self._thread.stop(timeout=2.0)

    async def publish(self, send: Callable[[], T]) -> T:
        """Run the blocking ``send`` off the caller's loop and return what it returned."""
        if self._source.owns_reply_queue:
            return await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(_called(send), self._thread.loop)
            )
        return await asyncio.get_running_loop().run_in_executor(self._publishers, send)

    def publish_later(self, send: Callable[[], object]) -> None:
        """Run ``send`` off the loop without waiting for it."""
        self._publishers.submit(send)

    async def meta(self, task_id: str) -> Meta:
        """Wait for the record of the finished task ``task_id``."""
        waiter = _Waiter(asyncio.get_running_loop())
        self._thread.loop.call_soon_threadsafe(self._add, task_id, waiter)
        try:
            return await waiter.future
        finally:
            self._thread.loop.call_soon_threadsafe(self._remove, task_id, waiter)

    def _add(self, task_id: str, waiter: _Waiter) -> None:
        if len(self._waiting) >= self.settings.max_waiting:
            waiter.settle(
                errors.UsageError(
                    f"{len(self._waiting)} calls wait for answers already (setting gw_max_waiting)"
                )
            )
            return
        self._waiting.setdefault(task_id, []).append(waiter)
        self._source.watch(task_id)

    def _remove(self, task_id: str, waiter: _Waiter) -> None:
        waiters = self._waiting.get(task_id, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters and self._waiting.pop(task_id, None) is not None:
            self._source.forget(task_id)

    def _resolve(self, task_id: str, meta: Meta | Exception) -> None:
        if not isinstance(meta, Exception) and meta["status"] not in states.READY_STATES:
            return
        if self._waiting.get(task_id):
            self._source.forget(task_id)
        for waiter in self._waiting.pop(task_id, []):
            waiter.settle(meta)


class _Waiter:
    """A future of the caller's loop, settled from the watcher's thread."""

    def __init__(self, caller: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[Meta] = caller.create_future()
        self._caller = caller

    def settle(self, answer: Meta | Exception) -> None:
        try:
            self._caller.call_soon_threadsafe(self._set, answer)
        except RuntimeError:
            return  # the caller's loop was closed: nobody waits any more

    def _set(self, answer: Meta | Exception) -> None:
        if self.future.done():
            return
        if isinstance(answer, Exception):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


async def _called(send: Callable[[], T]) -> T:
    return send()


_watchers: dict[int, Watcher] = {}
_making = threading.Lock()


def watcher(app: Any) -> Watcher:
    """Return this process's watcher for ``app``, starting it at the first use."""
    with _making:
        found = _watchers.get(id(app))
        if found is None or found.pid != os.getpid():  # a fork does not copy threads
            found = _watchers[id(app)] = Watcher(app)
        return found


async def answer(result: Any, task_name: str, timeout: float | None) -> Any:
    """Wait for ``result`` and return its value or raise its error.

    A cancelled wait, or one over ``timeout`` seconds, revokes the task.

    Raises:
        CallTimeout: when no answer came in ``timeout`` seconds.
    """
    if hasattr(result, "_result"):  # eager: answered already
        return result.get(disable_sync_subtasks=False)
    watch = watcher(result.app)
    try:
        async with asyncio.timeout(timeout):
            meta = await watch.meta(result.id)
    except TimeoutError as exc:
        watch.publish_later(functools.partial(result.revoke))
        raise errors.CallTimeout(too_late(task_name, result.id, timeout)) from exc
    except asyncio.CancelledError:
        watch.publish_later(functools.partial(result.revoke))
        raise
    return outcome.value_of(meta)


def require_no_loop(what: str) -> None:
    """Refuse to block a running event loop.

    Raises:
        BlockingCallError: when this thread runs one.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise errors.BlockingCallError(f"{what} would block the running event loop: await it instead")


def too_late(task_name: str, task_id: str, timeout: float | None) -> str:
    return (
        f"{task_name}[{task_id}] was not answered within {timeout} s and was revoked; is a worker "
        f"consuming its queue? (give more with .options(timeout=...))"
    )
