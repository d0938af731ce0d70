"""Find the Redis that all workers of an app share, for what they must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.backends.redis import RedisBackend

from gw_celery.transport import broker


def redis_of(app: Any) -> Callable[[], Any] | None:
    """Return what connects to the result backend's or the broker's Redis; None without one."""
    if isinstance(app.backend, RedisBackend):
        return lambda: app.backend.client
    with app.connection_for_write() as connection:
        if broker.redis_transport(connection) is None:
            return None
    return lambda: _client(app)


def _client(app: Any) -> Any:
    # The channel knows every form of address that the transport knows. What is closed with it are
    # its sockets: the client's pool goes on, and opens others.
    with app.connection_for_write() as connection:
        return connection.default_channel.client
