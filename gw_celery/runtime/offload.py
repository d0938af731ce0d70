"""Take what blocks off the event loop, while the greenlet of the tracer waits.

Celery's tracer is synchronous: on the loop, its publishing and storing would hold up every other
input. Here they run in threads; anywhere but in a stepping greenlet they run in place.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from celery.app import amqp
from kombu import pools

from gw_celery.runtime import greenlet_bridge

T = TypeVar("T")


class Offload:
    """Bounded threads for one kind of blocking call."""

    def __init__(self, name: str, threads: int, around: Callable[..., Any]) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"gw-{name}")
        #: Runs each call: database hygiene belongs into the thread of the call.
        self._around = around

    def __call__(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return ``fn(*args, **kwargs)``."""
        if not greenlet_bridge.can_park():
            return fn(*args, **kwargs)
        return greenlet_bridge.drive(self.run(fn, *args, **kwargs))

    async def run(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return ``fn(*args, **kwargs)``, from a thread, in the context of the caller."""
        call = functools.partial(contextvars.copy_context().run, self._around, fn, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class _Producers:
    """A pool of producers; taking one, which may connect, happens off the loop.

    A task of the event loop that is not the body of an input, such as a child of
    ``asyncio.gather``, cannot be parked. It would block the loop for a producer that only the loop
    gives back, so that it has a pool of its own.
    """

    def __init__(self, pool: Any, blocking: Any, offload: Offload) -> None:
        self._pool = pool
        self._blocking = blocking
        self._offload = offload

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        if greenlet_bridge.would_block_loop():
            return self._blocking.acquire(*args, **kwargs)
        return self._offload(self._pool.acquire, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def publishing(base: type[amqp.AMQP], around: Callable[..., Any]) -> type[amqp.AMQP]:
    """Return ``base`` with its publishing taken off the loop.

    Taking a producer and using it have threads of their own: threads that hold one must not
    wait behind threads that want one.
    """
    taking, sending = Offload("producers", 8, around), Offload("publish", 8, around)

    class OffLoop(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._making = threading.Lock()
            self._blocking: Any = None

        @property
        def producer_pool(self) -> Any:
            # Two threads that ask first would each make a pool; one is dropped with its
            # connection, and RabbitMQ may drop what that has just published.
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
