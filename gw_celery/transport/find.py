"""What kind of server the broker is, and the Redis in which workers and clients of a project agree.

That is the broker if it is a Redis, else the result backend, else there is none. Redis's own
clients are imported where they are made: they take half of the package's import time.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import redis.asyncio

#: Parameters of a connection that only the synchronous client takes.
_SYNC_ONLY = ("max_connections", "retry", "retry_on_timeout", "driver_info")


def redis_transport(connection: Any) -> Any | None:
    """Return kombu's transport class of ``connection`` where it speaks to a Redis, in any form.

    Sentinel is one, too. Nothing connects.
    """
    transport = connection.get_transport_cls()
    return transport if transport.driver_type == "redis" else None


def is_rabbitmq(connection: Any) -> bool:
    """Whether it can prefer some consumers of a queue to others, and tells a queue's length."""
    return bool(connection.get_transport_cls().driver_type == "amqp")


def tells_lengths(connection: Any) -> bool:
    """Whether one can read how many messages wait in a queue. Nothing connects."""
    return connection.get_transport_cls().driver_type in ("redis", "amqp")


def redis_of(app: Any, timeout: float) -> SharedRedis | None:
    """Return the shared Redis of an app; ``None`` where it has none. Nothing connects.

    Args:
        timeout: seconds that any one answer may take.
    """
    with app.connection_for_write() as connection:
        if redis_transport(connection) is not None:
            options = app.conf.broker_transport_options or {}
            return BrokerRedis(app, options.get("global_keyprefix", ""), timeout)
    from celery.backends.redis import RedisBackend

    if isinstance(app.backend, RedisBackend):
        return ResultsRedis(app, results_prefix(app.backend), timeout)
    return None


def results_prefix(backend: Any) -> str:
    """Return what keys beside the results of a Redis backend begin with."""
    key = backend.task_keyprefix
    written = key.decode() if isinstance(key, bytes) else str(key)
    return written.removesuffix(type(backend).task_keyprefix)


class SharedRedis:
    """A Redis, over connections of its own.

    Args:
        prefix: what all keys of the project begin with there.
        timeout: seconds that any one answer may take.
    """

    def __init__(self, app: Any, prefix: str, timeout: float) -> None:
        self.prefix = prefix
        self._app = app
        self._timeouts = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        self._client: Any = None

    def key(self, *parts: str) -> str:
        """Return the name of a key of ours."""
        return ":".join((f"{self.prefix}gw", *parts))

    def client(self) -> Any:
        """Return a client that puts no prefix before keys; the first call may connect."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def close(self) -> None:
        """Close the connections; the next ``client`` has new ones."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.connection_pool.disconnect()

    def _connect(self) -> Any:
        raise NotImplementedError


class BrokerRedis(SharedRedis):
    """The broker. Its channel knows every form of address that the transport knows."""

    _connection: Any = None

    def close(self) -> None:
        super().close()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.release()

    def lists(self, queue: str) -> list[str]:
        """Return the keys of a queue: kombu keeps a list for each priority."""
        channel = self._connection.default_channel
        return [
            f"{self.prefix}{channel._q_for_pri(queue, step)}" for step in channel.priority_steps
        ]

    def _connect(self) -> Any:
        import redis

        self._connection = connection = self._app.connection_for_write()
        connection.transport_options.update(self._timeouts)
        try:
            # At once, and no third time: its default channel alone would try for ever.
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            pool = connection.default_channel.client.connection_pool
        except BaseException:
            self.close()
            raise
        # kombu's own client puts the prefix before keys, but not for all commands.
        return redis.Redis(connection_pool=pool)


class ResultsRedis(SharedRedis):
    """The result backend."""

    def _connect(self) -> Any:
        backend = self._app.backend
        options = {**backend.connparams, **self._timeouts}
        if "path" in options:  # of a Unix socket
            del options["socket_connect_timeout"]
        return backend._create_client(**options)


def async_client(backend: Any, *, socket_timeout: float | None) -> redis.asyncio.Redis:
    """Return a client of its own, on the running loop, for the server of a Redis result backend.

    Args:
        socket_timeout: seconds until a silent server counts as lost; ``None`` for a subscription,
            which is silent for as long as nothing ends.
    """
    import redis.asyncio

    options = {key: value for key, value in backend.connparams.items() if value is not None}
    for name in _SYNC_ONLY:
        options.pop(name, None)
    cls = options.pop("connection_class", redis.Connection)
    options["connection_class"] = getattr(redis.asyncio, cls.__name__, redis.asyncio.Connection)
    options["socket_timeout"] = socket_timeout
    if socket_timeout is None:  # what listens all the time would read the answer to a check
        options.pop("health_check_interval", None)
    # Unlike Redis(connection_pool=...), this client closes its connections when it is closed.
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options))
