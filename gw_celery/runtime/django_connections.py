"""Keep Django's connections healthy in the threads of a replica.

Celery's Django fixup does it with signals of the worker's parent and of the tracer; a replica has
no such parent in it, and its tracer may run on the event loop, where Django refuses to be called.
"""

from __future__ import annotations

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

    def call(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        if not cleaners:
            return fn(*args, **kwargs)
        _clean(cleaners)
        try:
            return fn(*args, **kwargs)
        finally:
            _clean(cleaners)

    return call


class Shared:
    """The connections that asynchronous bodies use: those of ``sync_to_async``'s one thread.

    Bodies that run at the same time share them, so they are looked at before a body, once a
    second at most; Django itself makes a new one for one that was closed.
    """

    def __init__(self, app: Any) -> None:
        cleaners = _cleaners(app)
        self._last = 0.0
        self._clean: Callable[[], Awaitable[None]] | None = None
        if cleaners:
            sync_to_async = symbol_by_name("asgiref.sync:sync_to_async")
            close_old = symbol_by_name("django.db:close_old_connections")
            self._clean = sync_to_async(close_old)

    async def close_outdated(self) -> None:
        """Close connections that are too old or broken, when it is time."""
        now = time.monotonic()
        if self._clean is not None and now - self._last >= _PERIOD:
            self._last = now
            await self._clean()


def _cleaners(app: Any) -> list[Any]:
    return [fixup.worker_fixup for fixup in app._fixups if hasattr(fixup, "worker_fixup")]


def _clean(cleaners: list[Any]) -> None:
    for cleaner in cleaners:
        cleaner.close_database()
        cleaner.close_cache()
