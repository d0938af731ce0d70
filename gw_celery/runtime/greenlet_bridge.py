"""Runs a coroutine for synchronous code, such as Celery's tracer, in processes that run bodies.

In a *foreign thread* (the tracer of a stock pool), the caller hands the coroutine to the loop and
blocks. An interruption of its wait, such as a soft time limit, is raised in the coroutine. *On the
loop*, the caller must be inside a coroutine that this module steps in a greenlet. A nested
synchronous call, such as ``.delay()`` in eager mode, can then park the greenlet while the loop
continues.

Source of the stepping: SQLAlchemy's ``greenlet_spawn``. Here the greenlet steps the whole
coroutine, and hands over only the futures that it yields.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import greenlet
from celery import signals
from celery.app import amqp, trace
from celery.exceptions import SoftTimeLimitExceeded
from kombu import pools

from gw_celery import errors
from gw_celery.client import execution, task_context
from gw_celery.runtime import body

T = TypeVar("T")

#: Seconds between two checks of a waiting thread whether it should still wait.
_INTERVAL = 0.2
_HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")
_RECEIVERS = (
    signals.task_prerun,
    signals.task_postrun,
    signals.task_success,
    signals.task_failure,
    signals.task_retry,
)


class _Stepping(greenlet.greenlet):
    #: Returns the exception that caused a cancellation, to be raised instead, or ``None``.
    take_interrupt: Callable[[], BaseException | None]


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` to its end inside a stepping greenlet, which parks while it waits.

    Raises:
        BlockingCallError: if the caller is on an event loop but not in such a greenlet.
    """
    current = greenlet.getcurrent()
    if not isinstance(current, _Stepping) or current.parent is None:
        coroutine.close()
        raise errors.BlockingCallError(
            "a task was called synchronously on the event loop; write `await task(...)`, or call "
            "it directly in the task's body instead of in a task that the body created"
        )
    advance, argument = coroutine.send, None
    while True:
        try:
            waited_for = advance(argument)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        try:
            advance, argument = coroutine.send, current.parent.switch(waited_for)
        except BaseException as exc:
            advance, argument = coroutine.throw, exc
            if isinstance(exc, asyncio.CancelledError):
                argument = current.take_interrupt() or exc


def can_park() -> bool:
    current = greenlet.getcurrent()
    return isinstance(current, _Stepping) and current.parent is not None


async def step(
    fn: Callable[[], T], take_interrupt: Callable[[], BaseException | None] = lambda: None
) -> T:
    """Run a synchronous ``fn`` in a new greenlet, which ``drive`` parks while it waits.

    ``take_interrupt`` returns the exception that caused a cancellation, if any.
    """
    stepping = _Stepping(fn)
    stepping.take_interrupt = take_interrupt
    # Share the context of the asyncio task, so that awaited code sees context variables that the
    # body sets.
    stepping.gr_context = greenlet.getcurrent().gr_context
    answer: T = await _stepped(stepping)
    return answer


@types.coroutine
def _stepped(stepping: _Stepping) -> Generator[Any, Any, Any]:
    waited_for = stepping.switch()
    while not stepping.dead:
        try:
            sent = yield waited_for
        except BaseException as exc:
            waited_for = stepping.throw(exc)
        else:
            waited_for = stepping.switch(sent)
    return waited_for


def runs_on_loop(task: Any) -> bool:
    """Return whether the tracer of ``task`` may run on the loop instead of in a thread."""
    return _never_blocks(task) and not any(signal.receivers for signal in _RECEIVERS)


@functools.cache
def _never_blocks(task: Any) -> bool:
    """Return whether no synchronous code of the user surrounds the body of a task."""
    method = getattr(task, "gw_method", None)
    if method is None or not (method.is_async or method.batched):
        return False
    return not any(trace.task_has_custom(task, hook) for hook in _HOOKS)


class LoopCall(Generic[T]):
    """A coroutine that runs on a loop, in the caller's context, for a waiting thread.

    Args:
        loop: the loop.
        coroutine: the coroutine.
        soft_limit: seconds after which ``SoftTimeLimitExceeded`` is raised in it.
        hard_limit: seconds after which it is cancelled, and the thread raises ``HardLimit``.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T],
        soft_limit: float | None = None,
        hard_limit: float | None = None,
    ) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._soft_limit = soft_limit
        self._hard_limit = hard_limit
        self._context = contextvars.copy_context()
        self._followed = self._context.run(task_context.follow)
        self._timers: list[asyncio.TimerHandle] = []
        self._task: asyncio.Task[T] | None = None
        self._interrupt: BaseException | None = None
        self._abandoned: BaseException | None = None
        self._is_over = False
        # Not an Event: an exception during its wait could leave its internal lock held, and block
        # the loop.
        self._over = threading.Lock()
        self._over.acquire()

    def run(self, cancel_timeout: float, meanwhile: Callable[[], None] = lambda: None) -> T:
        """Start the coroutine, wait for it, and return or raise its outcome.

        A ``SoftTimeLimitExceeded`` that interrupts the wait is raised *in the coroutine*, as in a
        synchronous task. Any other exception cancels the coroutine. It is raised here once the
        coroutine has ended, or after ``cancel_timeout``; ``Stopped`` is raised at once.

        Args:
            cancel_timeout: seconds that a cancelled coroutine may take to end.
            meanwhile: called a few times per second; its exceptions interrupt the wait too.
        """
        try:
            while not self._is_over:
                try:
                    self._loop.call_soon_threadsafe(self._start)
                    # In short waits: an exception from another thread does not end a wait.
                    while not self._ends_within(_INTERVAL):
                        meanwhile()
                except SoftTimeLimitExceeded as limit:
                    self._loop.call_soon_threadsafe(self._cancel, limit)
        except BaseException as exc:
            self._loop.call_soon_threadsafe(self._cancel)
            if not isinstance(exc, execution.Stopped):
                self._ends_within(cancel_timeout)
            raise
        finally:
            self._followed.end()
        if self._abandoned is not None:
            raise self._abandoned
        if self._task is None:
            raise errors.WorkerStopped("the process ended before the call began: call it again")
        if self._task.cancelled():
            raise self._interrupt or errors.BodyExited(
                "the body cancelled its own task: raise an Exception to fail it"
            )
        return self._task.result()

    def take_interrupt(self) -> BaseException | None:
        """Return, once, the exception that replaces a cancellation."""
        exc, self._interrupt = self._interrupt, None
        if exc is not None and self._task is not None:
            self._task.uncancel()
        return exc

    def _ends_within(self, seconds: float) -> bool:
        return self._is_over or self._over.acquire(timeout=seconds)

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._over.release()

    def _start(self) -> None:
        """Start the coroutine if it has not started; an exception may have interrupted ``run``."""
        if self._task is not None:
            return
        # Contained, because an exit would end asyncio's loop.
        stepping = step(lambda: body.call(drive, self._coroutine), self.take_interrupt)
        self._task = self._loop.create_task(stepping, context=self._context)
        self._task.add_done_callback(self._finish)
        if self._soft_limit:
            soft = SoftTimeLimitExceeded(self._soft_limit)
            self._timers.append(self._loop.call_later(self._soft_limit, self._cancel, soft))
        if self._hard_limit:
            hard = execution.HardLimit(self._hard_limit)
            self._timers.append(self._loop.call_later(self._hard_limit, self._abandon, hard))

    def _finish(self, _: asyncio.Task[T]) -> None:
        for timer in self._timers:
            timer.cancel()
        self._coroutine.close()  # it may have been cancelled before its first step
        self._end()

    def _cancel(self, instead: BaseException | None = None) -> None:
        self._start()
        if self._task is not None and not self._task.done():
            self._interrupt = instead
            self._task.cancel()

    def _abandon(self, exc: BaseException) -> None:
        if not self._is_over:
            self._abandoned = exc
            self._cancel()
            self._end()


class Offload:
    """A thread pool for one kind of blocking call; outside a greenlet, the call runs in place.

    On the loop, Celery's publishing and storing would delay every other input.
    """

    def __init__(self, name: str, threads: int, around: Callable[..., Any]) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"gw-{name}")
        #: Wraps each call in its thread, for example to refresh database connections.
        self._around = around

    def __call__(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        if not can_park():
            return fn(*args, **kwargs)
        return drive(self.run(fn, *args, **kwargs))

    async def run(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return ``fn(*args, **kwargs)``, called in a thread in the caller's context."""
        call = functools.partial(contextvars.copy_context().run, self._around, fn, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class _Producers:
    """A pool of producers that connects off the loop.

    An asyncio task that is not the body of an input (such as a child of ``asyncio.gather``) cannot
    be parked. It would block the loop while it waits for a producer that only the loop returns, so
    that such tasks have a separate pool.
    """

    def __init__(self, pool: Any, blocking: Any, offload: Offload) -> None:
        self._pool = pool
        self._blocking = blocking
        self._offload = offload

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        if not can_park() and asyncio._get_running_loop() is not None:
            return self._blocking.acquire(*args, **kwargs)
        return self._offload(self._pool.acquire, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def publishing(base: type[amqp.AMQP], around: Callable[..., Any]) -> type[amqp.AMQP]:
    """Return a subclass of ``base`` that publishes off the loop.

    Acquiring and using a producer have separate threads: a thread that holds one must not wait
    behind threads that want one.
    """
    taking, sending = Offload("producers", 8, around), Offload("publish", 8, around)

    class OffLoop(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._making = threading.Lock()
            self._blocking: Any = None

        @property
        def producer_pool(self) -> Any:
            # Concurrent first uses would create two pools. One would be dropped with its
            # connection, and RabbitMQ may lose what that has just published.
            with self._making:
                pool = super().producer_pool
                if self._blocking is None:
                    connections = self.app.connection_for_write().Pool(limit=pool.limit)
                    self._blocking = pools.ProducerPool(connections, limit=pool.limit)
            return _Producers(pool, self._blocking, taking)

        def _create_task_sender(self) -> Any:
            send = super()._create_task_sender()
            return lambda *args, **kwargs: sending(send, *args, **kwargs)

    OffLoop.__name__ = base.__name__
    return OffLoop
