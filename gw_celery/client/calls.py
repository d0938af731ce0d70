"""Sends calls and receives their answers in threads of the process that calls."""

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
#: A future that gets the ``AsyncResult`` of a call when the call is sent.
Sending = concurrent.futures.Future[Any]

#: Seconds that a process waits at its exit for calls and revocations that are being sent.
_LAST_WORDS = 2.0


class Spawned:
    """A call in flight: ``get`` it, ``await`` it, or ``cancel`` it."""

    def __init__(self, task: Any, sending: Sending, timeout: float | None) -> None:
        self._task = task
        self._sending = sending
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Spawned {self._task.name}[{self.id}]>"

    @property
    def id(self) -> str:
        """The task id; reading it waits until the call is sent."""
        return str(self._sending.result().id)

    def get(self, timeout: float | None = None) -> Any:
        """Block until the answer arrives, and return its value or raise its error.

        Args:
            timeout: maximum seconds to wait; ``None``: the value of ``.options(timeout=...)``.

        Raises:
            BlockingCallError: on a running event loop, or inside a task; use ``await`` there.
            CallTimeout: if no answer arrives in time; the call is revoked.
        """
        require_may_block(f"{self._task.name}[{self.id}].get()")
        return block(self._value(self._timeout if timeout is None else timeout))

    def cancel(self) -> None:
        """Revoke the call: no worker starts it from now on, but a running body continues."""
        self._sending.result().revoke()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._value(self._timeout).__await__()

    async def _value(self, timeout: float | None) -> Any:
        sending = self._sending
        if sending.done() and isinstance(result := sending.result(), EagerResult):
            # Celery's flag for "inside a task" is global: another thread may have set it.
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
            if not bound.expired():  # a time-out of the broker's client
                raise
            watch.give_up(sending)
            raise self._too_late(result, timeout) from exc
        if meta["status"] in states.PROPAGATE_STATES:
            raise results.restored(meta["result"], meta.get("traceback"))
        return meta["result"]

    def _wait_sent(self) -> None:
        """Block until the call is sent; give it up after its time limit."""
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
    """Makes blocking calls in daemon threads, which begin them in order of submission.

    While a broker is unreachable, Celery's publishing blocks its thread, and a timeout could not
    interrupt a caller's thread. Threads of ``concurrent.futures`` are unsuitable: the interpreter
    waits for them at its exit, without limit.

    Args:
        threads: number of the threads.
        name: beginning of their names.
    """

    def __init__(self, threads: int, name: str = "gw-publish") -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:  # the system refuses more threads: end the started ones
            for _ in self._threads:
                self._queue.put(None)
            raise

    @property
    def backlog(self) -> int:
        return self._queue.qsize()

    def submit(self, send: Callable[[], Any]) -> Sending:
        """Queue ``send``, to run in the caller's context and task; cancel the future to drop it."""
        context = contextvars.copy_context()
        context.run(task_context.follow)  # Celery records the task that makes the call
        sending: Sending = concurrent.futures.Future()
        with self._closing:
            if self._is_closed:
                late = errors.UsageError("this process is exiting: make calls before it does")
                sending.set_exception(late)
            else:
                self._queue.put(lambda: _settle(sending, context, send))
        return sending

    def close(self, timeout: float) -> None:
        """End the threads when everything is published; wait ``timeout`` seconds at most."""
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
            del publish  # release the sent arguments while the thread is idle


def _settle(sending: Sending, context: contextvars.Context, send: Callable[[], Any]) -> None:
    if not sending.set_running_or_notify_cancel():
        return
    try:
        sending.set_result(context.run(send))
    except BaseException as exc:
        sending.set_exception(exc)


class Watcher:
    """Sends this process's calls for one Celery app, and receives their answers.

    It is a thread with its own loop, because callers run on many loops: those of an ASGI server, of
    ``async_to_sync``, of scripts. With the Redis backend it holds one subscription connection; it
    polls any other backend.
    """

    def __init__(self, app: Any) -> None:
        _require_backend(app)
        self.settings = conf.read(app.conf)
        self.pid = os.getpid()
        # Create the pool before the threads do: Celery creates it at the first use, and concurrent
        # threads would create several. A discarded pool may lose a message to RabbitMQ.
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
            with asyncio.Runner() as runner:  # it raises if no more files can be opened
                runner.run(self._live(app, is_up))
        except BaseException as exc:
            if is_up.done():
                raise
            is_up.set_exception(exc)

    async def _live(self, app: Any, is_up: concurrent.futures.Future[_Parts]) -> None:
        # A late import: the Redis clients take half of the import time of the package, and most
        # processes that import it never wait for an answer.
        from gw_celery.client import result_sources

        # Create it on this thread: Celery gives each thread a result backend of its own.
        start_reader = functools.partial(Publisher, 1, "gw-results")
        source = result_sources.of(app, self.settings.poll_interval, start_reader)
        self._publisher = Publisher(self.settings.publish_threads)
        is_up.set_result((asyncio.get_running_loop(), source))
        await self._closing.wait()
        source.close()

    def close(self) -> None:
        """End the watcher's threads; calls that still wait get no answer."""
        self._publisher.close(_LAST_WORDS)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_LAST_WORDS)

    def submit(self, send: Callable[..., Any]) -> Sending:
        """Send a call on a publisher's thread, with options that route its answer to this watcher.

        Args:
            send: called with the watcher's own options for ``apply_async``; returns the
                ``AsyncResult``.
        """
        if self._publisher.backlog >= self.settings.max_waiting:
            raise _too_many(self._publisher.backlog, "to be sent")
        return self._publisher.submit(lambda: send(**self._source.prepare()))

    async def meta(self, task_id: str) -> Meta:
        """Wait until a task has finished, and return the record of its result."""
        waiter: concurrent.futures.Future[Meta] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._add, task_id, waiter)
        try:
            return await asyncio.wrap_future(waiter)
        finally:
            self._loop.call_soon_threadsafe(self._source.remove, task_id, waiter)

    def give_up(self, sending: Sending) -> None:
        """Cancel a call that is not sent yet; revoke a sent call."""
        if not sending.cancel():
            sending.add_done_callback(self._revoke)

    def _revoke(self, sending: Sending) -> None:
        """Revoke on a publisher's thread, so that the caller does not wait."""
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
    """Return this process's watcher for ``app``; start it at the first use.

    Raises:
        ConfigurationError: if the app has no result backend.
    """
    with _making:
        watch = _watchers.get(id(app))
        if watch is None or watch.pid != os.getpid():  # a fork does not copy threads
            watch = _watchers[id(app)] = Watcher(app)
        return watch


def close_all() -> None:
    """Close the watchers of this process; the next call of an app creates a new one."""
    with _making:
        ours = [watch for watch in _watchers.values() if watch.pid == os.getpid()]
        _watchers.clear()
    for watch in ours:
        atexit.unregister(watch.close)
        watch.close()


def block(waits: Coroutine[Any, Any, Any]) -> Any:
    """Run ``waits`` on this thread; the caller must check first that it may block."""
    # With a factory, the runner does not replace the thread's own event loop.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(waits)


def require_may_block(what: str) -> None:
    """Raise if the call ``what`` would stop an event loop or occupy a worker.

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
