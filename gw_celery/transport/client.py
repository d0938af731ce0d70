"""An asynchronous client for the server of Celery's Redis result backend."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio

#: What only the synchronous client takes.
_SYNC_ONLY = ("max_connections", "retry", "retry_on_timeout", "driver_info")


def of(backend: Any, *, socket_timeout: float | None) -> redis.asyncio.Redis:
    """Return a client of its own for the running loop.

    Args:
        socket_timeout: seconds until a silent server counts as lost; ``None`` for a subscription,
            which is silent for as long as nothing ends.
    """
    options = {key: value for key, value in backend.connparams.items() if value is not None}
    for name in _SYNC_ONLY:
        options.pop(name, None)
    cls = options.pop("connection_class", redis.Connection)
    options["connection_class"] = getattr(redis.asyncio, cls.__name__, redis.asyncio.Connection)
    options["socket_timeout"] = socket_timeout
    # Unlike Redis(connection_pool=...), this client closes its connections when it is closed.
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options))
