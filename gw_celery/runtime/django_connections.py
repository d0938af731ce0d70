"""Keeps Django's connections healthy in the threads of a child of our pool.

Celery's Django fixup uses signals of the worker's parent and of the tracer. A child has no such
parent, and its tracer may run on the event loop, where Django refuses calls.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kombu.utils.imports import symbol_by_name

T = TypeVar("T")

#: Minimum seconds between two checks of the connections of asynchronous bodies.
_PERIOD = 1.0


def around(app: Any) -> Callable[..., Any]:
    """Return a function that calls another one with fresh connections in its thread."""
    cleaners = _cleaners(app)
    if not cleaners:
        return operator.call

    def clean() -> None:
        for cleaner in cleaners:
            cleaner.close_database()
            cleaner.close_cache()

    def call(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        clean()
        try:
            return fn(*args, **kwargs)
        finally:
            clean()

    return call


def closing_outdated(app: Any) -> Callable[[], Awaitable[None]] | None:
    """Return a coroutine function that closes outdated connections of asynchronous bodies.

    These belong to the single thread of ``sync_to_async``, and concurrent bodies share them. They
    are checked before a body, at most once a second; Django reopens a closed one. ``None`` without
    Django.
    """
    if not _cleaners(app):
        return None
    sync_to_async = symbol_by_name("asgiref.sync:sync_to_async")
    close_old = sync_to_async(symbol_by_name("django.db:close_old_connections"))
    last = 0.0

    async def close_outdated() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PERIOD:
            last = now
            await close_old()

    return close_outdated


def _cleaners(app: Any) -> list[Any]:
    return [fixup.worker_fixup for fixup in app._fixups if hasattr(fixup, "worker_fixup")]
