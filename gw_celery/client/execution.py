"""What runs bodies in this process, as the code of callers sees it; a web process has nothing."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from typing import Any, Protocol

from gw_celery import types


class Runtime(Protocol):
    """The loaded services of one process; every ``task`` is a Celery task of ours."""

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
    """The hard time limit of an input passed."""


class Revoked(Stopped):
    """The input was revoked while it ran."""


#: The call that the body is; ``None`` for one of a single input.
batch: contextvars.ContextVar[types.Batch | None] = contextvars.ContextVar("gw_batch", default=None)
_installed: Runtime | None = None


def current_batch() -> types.Batch | None:
    """Return the call that a batched body is running as: its size, and how long its inputs waited.

    ``None`` outside such a body, and where no batches are formed: Celery's own pools, eager mode.
    """
    return batch.get()


def install(runtime: Runtime | None) -> None:
    """Make ``runtime`` the one of this process; ``None`` for none."""
    global _installed
    _installed = runtime


def current() -> Runtime | None:
    """Return this process's runtime; ``None`` where nothing is served."""
    is_here = _installed is not None and _installed.pid == os.getpid()  # a fork has no loop
    return _installed if is_here else None


def started(app: Any) -> Runtime:
    """Return this process's runtime, starting an empty one for eager mode when there is none."""
    from gw_celery.runtime import in_process  # no web process needs what runs bodies

    return in_process.started(app)


def stop() -> None:
    """Leave what this process has entered, if anything."""
    if (runtime := current()) is not None:
        install(None)
        runtime.stop()
