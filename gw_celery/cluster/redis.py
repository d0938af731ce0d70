"""Where workers leave word for callers: a Redis that both know, of the broker or the results."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from gw_celery.transport import broker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """A Redis, and how the keys of this app begin there."""

    client: Any
    prefix: str = ""
    pid: int = dataclasses.field(default_factory=os.getpid)

    def key(self, what: str, queue: str) -> str:
        return f"{self.prefix}gw:{what}:{queue}"

    def close(self) -> None:
        self.client.close()


def of(app: Any, timeout: float) -> Board | None:
    """Return the board of an app, over a client of its own; ``None`` where it has no Redis.

    Nothing connects. The broker goes first: a caller may have no result backend.

    Args:
        timeout: seconds that any one answer may take.
    """
    waits = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    with app.connection_for_write() as connection:
        # Sentinel asks several servers one after the other.
        if broker.redis_transport(connection) is not None and connection.transport_cls in _PLAIN:
            given = app.conf.broker_transport_options or {}
            return Board(
                client=_connect(_of_broker(connection) | waits),
                prefix=given.get("global_keyprefix", ""),
            )
    return _of_results(app, waits)


_PLAIN = ("redis", "rediss")


def _of_results(app: Any, waits: Mapping[str, float]) -> Board | None:
    # Here: the Redis clients take half of the package's import time.
    from celery.backends.redis import RedisBackend

    if type(app.backend) is not RedisBackend:
        return None
    given = app.conf.result_backend_transport_options or {}
    return Board(
        client=_connect({**app.backend.connparams, **waits}),
        prefix=given.get("global_keyprefix", ""),
    )


def _connect(options: Mapping[str, Any]) -> Any:
    import redis

    given = {key: value for key, value in options.items() if value is not None}
    if given.get("connection_class") is redis.UnixDomainSocketConnection:
        given.pop("socket_connect_timeout", None)
    pool = redis.ConnectionPool(**{**given, "decode_responses": True, "max_connections": None})
    return redis.Redis.from_pool(pool)


def _of_broker(connection: Any) -> dict[str, Any]:
    """What kombu's channel makes of the URL; it would connect at once, and without a bound."""
    import redis

    host, ssl = connection.hostname or "localhost", connection.ssl
    if host.startswith("socket://"):
        path, _, query = host.removeprefix("socket://").partition("?")
        asked = dict(parse_qsl(query))
        return {
            "connection_class": redis.UnixDomainSocketConnection,
            "path": path,
            "db": _number(asked.get("virtual_host")),
            "password": asked.get("password"),
        }
    secure = {"connection_class": redis.SSLConnection} if ssl else {}
    return {
        **secure,
        **(ssl if isinstance(ssl, dict) else {}),
        "host": host,
        "port": connection.port or 6379,
        "db": _number(connection.virtual_host),
        "username": connection.userid,
        "password": connection.password,
    }


def _number(virtual_host: Any) -> int:
    text = str(virtual_host or "").strip("/")
    return int(text) if text.isdigit() else 0
