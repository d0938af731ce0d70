"""Keep Django's connections healthy in the threads of a replica.

Celery's Django fixup does it with signals of the worker's parent and of the tracer; a replica has
no such parent in it, and its tracer may run on the event loop, where Django refuses to be called.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kombu.utils.imports import symbol_by_name

T = TypeVar("T")

#: Seconds between two looks at the connections of asynchronous bodies.
_PERIOD = 1.0


def around(app: Any) -> Callable[..., Any]:
    """Return a function that calls what it is given, with clean connections in that thread."""
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
    """Return what closes connections of asynchronous bodies that are too old or broken, in time.

    Those are the connections of ``sync_to_async``'s one thread. Bodies that run at the same time
    share them, so they are looked at before a body, once a second at most; Django itself makes a
    new one for one that was closed. ``None`` without Django.
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
