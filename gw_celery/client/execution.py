"""The seam between callers and the runtime that runs bodies; a web process has no runtime."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from typing import Any, Protocol

from celery import _state

from gw_celery import types
from gw_celery.protocol import headers


class Runtime(Protocol):
    """The loaded services of one process. Every ``task`` is one of our Celery tasks."""

    pid: int
    loop: asyncio.AbstractEventLoop

    def is_on_loop(self) -> bool: ...
    def serves(self, service_key: str) -> bool: ...
    def context(self, key: str) -> Any: ...
    def load(self, task: Any) -> None: ...
    def run(self, task: Any, args: Any, kwargs: Any) -> Any: ...
    def can_run(self, task: Any) -> bool: ...
    async def run_async(self, task: Any, options: Any, args: Any, kwargs: Any) -> Any: ...
    async def call_eagerly(self, task: Any, send: Callable[[], Any]) -> Any: ...
    def stop(self) -> None: ...


class Stopped(BaseException):
    """Ends the tracer's wait for a body; ``autoretry_for=(Exception,)`` does not catch it."""


class HardLimit(Stopped):
    """An input exceeded its hard time limit."""


class Revoked(Stopped):
    """An input was revoked while it ran."""


#: The batch that the running body serves; ``None`` for a body of a single input.
batch: contextvars.ContextVar[types.Batch | None] = contextvars.ContextVar("gw_batch", default=None)
_installed: Runtime | None = None


def current_batch() -> types.Batch | None:
    """Return the batch that the running body serves.

    Returns:
        The size of the batch, why it was flushed, and how long each input waited. ``None`` in
        other bodies, on Celery's own pools, and in eager mode.
    """
    return batch.get()


def hold_id() -> str | None:
    """Return the name of the hold of the running input's message, a token for its side effects.

    Each delivery of an input by a Redis broker to the GPU pool has a hold of its own, so that two
    runs of an input have different names.

    Returns:
        ``"<incarnation of the worker>/<number>"``. ``None`` outside an input, in the body of a
        batch, in eager mode, on other brokers, and on Celery's own pools.
    """
    task = _state.get_current_task()
    return None if task is None else headers.hold_of(task.request)


def install(runtime: Runtime | None) -> None:
    """Set the runtime of this process; ``None`` removes it."""
    global _installed
    _installed = runtime


def current() -> Runtime | None:
    """Return the runtime of this process; ``None`` if it serves nothing."""
    is_here = _installed is not None and _installed.pid == os.getpid()  # a fork has no loop
    return _installed if is_here else None


def started(app: Any) -> Runtime:
    """Return the runtime of this process; start an empty one, for eager mode, if there is none."""
    from gw_celery.runtime import in_process  # a web process does not need the runtime

    return in_process.started(app)


def stop() -> None:
    """Exit everything that this process has entered, if it has a runtime."""
    if (runtime := current()) is not None:
        install(None)
        runtime.stop()
