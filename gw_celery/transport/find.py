"""Find the Redis in which the workers and clients of a project agree on things, in one place.

It is the broker if that is a Redis, else the result backend, else there is none.
"""

from __future__ import annotations

import contextlib
from typing import Any

from gw_celery.transport import broker


def redis_of(app: Any, timeout: float) -> SharedRedis | None:
    """Return the shared Redis of an app; ``None`` where it has none. Nothing connects.

    Args:
        timeout: seconds that any one answer may take.
    """
    with app.connection_for_write() as connection:
        if broker.redis_transport(connection) is not None:
            options = app.conf.broker_transport_options or {}
            return BrokerRedis(app, options.get("global_keyprefix", ""), timeout)
    # Here: the Redis clients take half of the package's import time.
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
