"""Calls under way: how they are sent, and one watcher per process for the answers of all."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextvars
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any

from celery import states
from celery._state import get_current_task, task_join_will_block
from celery.app import backends
from celery.backends.base import DisabledBackend
from celery.result import EagerResult

from gw_celery import conf, errors
from gw_celery.client import results, task_context

if TYPE_CHECKING:
    from gw_celery.client import result_sources

    _Parts = tuple[asyncio.AbstractEventLoop, result_sources.Source]

logger = logging.getLogger(__name__)

Meta = Mapping[str, Any]
#: Has the ``AsyncResult`` of a call once it is sent.
Sending = concurrent.futures.Future[Any]

#: Seconds that the exit of a process waits for calls and revocations that are being sent.
_LAST_WORDS = 2.0


class Spawned:
    """A call under way: ``get`` it, ``await`` it, or ``cancel`` it."""

    def __init__(self, task: Any, sending: Sending, timeout: float | None) -> None:
        self._task = task
        self._sending = sending
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Spawned {self._task.name}[{self.id}]>"

    @property
    def id(self) -> str:
        return str(self._sending.result().id)

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer, ``timeout`` seconds at most, and return it or raise its error.

        Raises:
            BlockingCallError: on a running event loop, or inside a task; ``await`` it there.
            CallTimeout: when it is not there in time; the call is revoked.
        """
        require_may_block(f"{self._task.name}[{self.id}].get()")
        return block(self._value(self._timeout if timeout is None else timeout))

    def cancel(self) -> None:
        """Revoke the call: it is not started any more; a body that runs goes on."""
        self._sending.result().revoke()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._value(self._timeout).__await__()

    async def _value(self, timeout: float | None) -> Any:
        sending = self._sending
        if sending.done() and isinstance(result := sending.result(), EagerResult):
            # Celery's flag of "inside a task" is the whole process's: another thread's, here.
            return result.get(disable_sync_subtasks=False)
        watch, result = watcher(self._task.app), None
        try:
            async with asyncio.timeout(timeout) as bound:
                result = await asyncio.wrap_future(sending)
                meta = await watch.meta(result.id)
        except asyncio.CancelledError:
            watch.give_up(sending)
            raise
        except TimeoutError as exc:
            if not bound.expired():  # a broker's client has time-outs, too
                raise
            watch.give_up(sending)
            raise self._too_late(result, timeout) from exc
        if meta["status"] in states.PROPAGATE_STATES:
            raise results.restored(meta["result"], meta.get("traceback"))
        return meta["result"]

    def _wait_sent(self) -> None:
        """Block until the call is sent; one that is late is given up."""
        if not concurrent.futures.wait([self._sending], self._timeout).done:
            watcher(self._task.app).give_up(self._sending)
            raise self._too_late(None, self._timeout)
        self._sending.result()

    def _too_late(self, result: Any, timeout: float | None) -> errors.CallTimeout:
        name = self._task.name
        if result is None:
            late = f"{name} could not be sent within {timeout} s: does the broker answer?"
        else:
            late = (
                f"{name}[{result.id}] was not answered within {timeout} s and was revoked; is a "
                f"worker consuming its queue?"
            )
        return errors.CallTimeout(f"{late} (give more with .options(timeout=...))")


class Publisher:
    """Publishes in ``threads`` daemon threads at most, in the order given.

    Publishing is synchronous in Celery and blocks for as long as a broker is away, or frozen: on a
    caller's thread no time-out could end it. The threads of ``concurrent.futures`` cannot be used:
    the interpreter waits for them, without limit, before it exits.
    """

    def __init__(self, threads: int) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"gw-publish-{number}", daemon=True)
            for number in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:  # the process may have no more: those that have started end
            for _ in self._threads:
                self._queue.put(None)
            raise

    @property
    def backlog(self) -> int:
        """How many publications have not begun."""
        return self._queue.qsize()

    def submit(self, send: Callable[[], Any]) -> Sending:
        """Run ``send`` in the caller's context and identity; one not begun can be cancelled."""
        context = contextvars.copy_context()
        context.run(task_context.follow)  # Celery notes the task that a call is made in
        sending: Sending = concurrent.futures.Future()
        with self._closing:
            if self._is_closed:
                late = errors.UsageError("this process is exiting: make calls before it does")
                sending.set_exception(late)
            else:
                self._queue.put(lambda: _settle(sending, context, send))
        return sending

    def close(self, timeout: float) -> None:
        """End the threads once all is published; wait ``timeout`` seconds for that at most."""
        with self._closing:
            self._is_closed = True
            for _ in self._threads:
                self._queue.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (publish := self._queue.get()) is not None:
            publish()
            del publish  # the idle thread must not keep what was sent


def _settle(sending: Sending, context: contextvars.Context, send: Callable[[], Any]) -> None:
    if not sending.set_running_or_notify_cancel():
        return
    try:
        sending.set_result(context.run(send))
    except BaseException as exc:
        sending.set_exception(exc)


class Watcher:
    """Sends the calls of this process for one Celery app, and resolves their answers.

    It is a thread with a loop of its own, because callers come from many loops (an ASGI server's,
    one per ``async_to_sync``, scripts). With the Redis backend it holds one subscription
    connection; any other backend is asked at intervals.
    """

    def __init__(self, app: Any) -> None:
        _require_backend(app)
        self.settings = conf.read(app.conf)
        self.pid = os.getpid()
        # Celery makes it at the first use. Of threads that came at once each would make one, and
        # RabbitMQ may drop what was published over a connection that is dropped with its pool.
        _ = app.amqp.producer_pool
        self._closing = asyncio.Event()
        is_up: concurrent.futures.Future[_Parts] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(app, is_up), name="gw-watcher", daemon=True
        )
        self._thread.start()
        self._loop, self._source = is_up.result()
        atexit.register(self.close)

    def _run(self, app: Any, is_up: concurrent.futures.Future[_Parts]) -> None:
        try:
            with asyncio.Runner() as runner:  # which fails where no more files can be open
                runner.run(self._live(app, is_up))
        except BaseException as exc:
            if is_up.done():
                raise
            is_up.set_exception(exc)

    async def _live(self, app: Any, is_up: concurrent.futures.Future[_Parts]) -> None:
        # Here: the Redis clients take half of the package's import time, and most processes
        # that import it never wait for an answer.
        from gw_celery.client import result_sources

        # On this thread: Celery gives each thread a result backend of its own.
        source = result_sources.of(app, self.settings.poll_interval)
        self._publisher = Publisher(self.settings.publish_threads)
        is_up.set_result((asyncio.get_running_loop(), source))
        await self._closing.wait()

    def close(self) -> None:
        """End the watcher's threads; calls that still wait get no answer any more."""
        self._publisher.close(_LAST_WORDS)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_LAST_WORDS)

    def submit(self, send: Callable[..., Any]) -> Sending:
        """Send a call off the caller's thread, so that its answer comes to this watcher.

        Args:
            send: takes the options of ``apply_async`` that the watcher adds, and returns the
                ``AsyncResult``.
        """
        if self._publisher.backlog >= self.settings.max_waiting:
            raise _too_many(self._publisher.backlog, "to be sent")
        return self._publisher.submit(lambda: send(**self._source.prepare()))

    async def meta(self, task_id: str) -> Meta:
        """Wait for the record of the finished task ``task_id``."""
        waiter: concurrent.futures.Future[Meta] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._add, task_id, waiter)
        try:
            return await asyncio.wrap_future(waiter)
        finally:
            self._loop.call_soon_threadsafe(self._source.remove, task_id, waiter)

    def give_up(self, sending: Sending) -> None:
        """Do not send a call, or revoke it once it is sent."""
        if not sending.cancel():
            sending.add_done_callback(self._revoke)

    def _revoke(self, sending: Sending) -> None:
        """Revoke off the caller's thread; nothing waits for it."""
        if sending.exception() is None:
            result = sending.result()
            log_failure = functools.partial(_log_failure, result.id)
            self._publisher.submit(result.revoke).add_done_callback(log_failure)

    def _add(self, task_id: str, waiter: concurrent.futures.Future[Meta]) -> None:
        number = len(self._source.waiting)
        if number < self.settings.max_waiting:
            self._source.add(task_id, waiter)
        elif waiter.set_running_or_notify_cancel():
            waiter.set_exception(_too_many(number, "for answers"))


_watchers: dict[int, Watcher] = {}
_making = threading.Lock()


def watcher(app: Any) -> Watcher:
    """Return this process's watcher for ``app``, starting it at the first use.

    Raises:
        ConfigurationError: when the app has no result backend, so that no answer would ever come.
    """
    with _making:
        watch = _watchers.get(id(app))
        if watch is None or watch.pid != os.getpid():  # a fork does not copy threads
            watch = _watchers[id(app)] = Watcher(app)
        return watch


def close_all() -> None:
    """Close the watchers of this process; the next call of an app makes another."""
    with _making:
        ours = [watch for watch in _watchers.values() if watch.pid == os.getpid()]
        _watchers.clear()
    for watch in ours:
        atexit.unregister(watch.close)
        watch.close()


def block(waits: Coroutine[Any, Any, Any]) -> Any:
    """Run ``waits`` to its end on this thread; the caller has made sure that it may."""
    # With a factory, the runner leaves the thread's own event loop alone.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(waits)


def require_may_block(what: str) -> None:
    """Refuse to block where that would stop a loop or hold a worker.

    Raises:
        BlockingCallError: on a running event loop, or inside a task.
    """
    if asyncio._get_running_loop() is not None:
        raise errors.BlockingCallError(
            f"{what} would block the running event loop: await it instead"
        )
    if task_join_will_block() and get_current_task() is not None:
        raise errors.BlockingCallError(
            f"{what} inside a task would hold a worker while it waits for another one: chain the "
            f"tasks, or `await` it in an asynchronous task"
        )


def _require_backend(app: Any) -> None:
    backend, _ = backends.by_url(app.backend_cls or app.conf.result_backend, app.loader)
    if issubclass(backend, DisabledBackend):
        raise errors.ConfigurationError(
            f"the Celery app {app.main!r} has no result backend (result_backend="
            f"{app.conf.result_backend!r}), so no answer can come: set result_backend, "
            f"or CELERY_RESULT_BACKEND, to the URL that its workers have (redis://... is the "
            f"quickest), or send the task with .delay()"
        )


def _too_many(number: int, what: str) -> errors.UsageError:
    return errors.UsageError(f"{number} calls wait {what} already (setting gw_max_waiting)")


def _log_failure(task_id: str, revoking: Sending) -> None:
    if exc := revoking.exception():
        logger.warning("input %s could not be revoked: %r; it may still run", task_id, exc)
