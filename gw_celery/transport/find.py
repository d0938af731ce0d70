"""Finds the kind of broker, and the Redis that workers and clients of a project share.

That Redis is the broker if possible, else the result backend, else there is none. Every process
uses this module. Redis clients are imported late, because they take half of the package's import
time.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from kombu.utils.encoding import bytes_to_str

from gw_celery.transport import refusals

if TYPE_CHECKING:
    import redis.asyncio

logger = logging.getLogger(__name__)

#: Parameters of a connection that only the synchronous client accepts.
_SYNC_ONLY = ("max_connections", "retry", "retry_on_timeout", "driver_info")


def redis_transport(connection: Any) -> Any | None:
    """Return kombu's transport class if ``connection`` uses Redis or Sentinel, else ``None``.

    This does not connect.
    """
    transport = connection.get_transport_cls()
    return transport if transport.driver_type == "redis" else None


def is_rabbitmq(connection: Any) -> bool:
    """Return whether the broker has consumer priorities and can report a queue's length."""
    return bool(connection.get_transport_cls().driver_type == "amqp")


def tells_lengths(connection: Any) -> bool:
    """Return whether the broker can report a queue's length, without connecting."""
    return connection.get_transport_cls().driver_type in ("redis", "amqp")


def redis_of(app: Any, timeout: float) -> SharedRedis | None:
    """Return the shared Redis of an app, without connecting; ``None`` if there is none.

    Args:
        app: the Celery app.
        timeout: seconds that each answer may take.
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
    """Return the prefix of a Redis backend's keys, for keys beside its results."""
    key: str = bytes_to_str(backend.task_keyprefix)
    return key.removesuffix(type(backend).task_keyprefix)


class SharedRedis:
    """A Redis, over separate connections.

    Args:
        app: the Celery app.
        prefix: prefix of all keys of the project.
        timeout: seconds that each answer may take.
    """

    def __init__(self, app: Any, prefix: str, timeout: float) -> None:
        self.prefix = prefix
        self._app = app
        self._timeouts = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        self._client: Any = None

    def key(self, *parts: str) -> str:
        return ":".join((f"{self.prefix}gw", *parts))

    def client(self) -> Any:
        """Return a client that adds no prefix to keys; the first call may connect."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def close(self) -> None:
        """Close the connections; the next ``client`` opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.connection_pool.disconnect()

    def _connect(self) -> Any:
        raise NotImplementedError


class BrokerRedis(SharedRedis):
    """The broker; its channel supports every form of URL that kombu supports."""

    _connection: Any = None

    def close(self) -> None:
        super().close()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.release()

    def lists(self, queue: str) -> list[str]:
        """Return the keys of a queue: kombu has one list per priority."""
        channel = self._connection.default_channel
        return [
            f"{self.prefix}{channel._q_for_pri(queue, step)}" for step in channel.priority_steps
        ]

    def _connect(self) -> Any:
        import redis

        self._connection = connection = self._app.connection_for_write()
        connection.transport_options.update(self._timeouts)
        try:
            # Two attempts without a pause; the default channel alone would retry for ever.
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            pool = connection.default_channel.client.connection_pool
        except BaseException:
            self.close()
            raise
        # kombu's own client adds the prefix to keys, but not for all commands.
        return redis.Redis(connection_pool=pool)


class ResultsRedis(SharedRedis):
    def _connect(self) -> Any:
        return results_client(self._app.backend, self._timeouts["socket_timeout"])


def remove_foreign(client: Any, key: str, kind: str) -> None:
    """Delete and report a key of ours that something else has written with another type.

    Args:
        client: adds no prefix to keys.
        key: may exist only as ``kind``.
        kind: by the names of Redis's command TYPE.
    """
    if (other := bytes_to_str(client.type(key))) not in (kind, "none"):
        client.delete(key)
        logger.error(
            "the key %s in Redis was a %s, but only workers of gw_celery may write it, as a %s: it "
            "is deleted. Find out what wrote it",
            *(key, other, kind),
        )


def fields(client: Any, key: str) -> list[bytes]:
    """Return the fields of a hash of ours; none if it is not a hash, which is deleted."""
    try:
        return list(client.hkeys(key))
    except Exception as exc:
        if not refusals.is_wrong_type(exc):
            raise
        remove_foreign(client, key, "hash")
        return []


def results_client(backend: Any, timeout: float) -> Any:
    """Return a new client for the server of a Redis result backend.

    Args:
        backend: the result backend.
        timeout: seconds that a connection and each answer may take.
    """
    options = {**backend.connparams, "socket_timeout": timeout, "socket_connect_timeout": timeout}
    if "path" in options:  # a Unix socket
        del options["socket_connect_timeout"]
    return backend._create_client(**options)


def async_client(backend: Any, *, socket_timeout: float | None) -> redis.asyncio.Redis:
    """Return a new client, on the running loop, for the server of a Redis result backend.

    Args:
        backend: the result backend.
        socket_timeout: seconds after which a silent server counts as lost; ``None`` for a
            subscription, which is silent while no task ends.
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
    # Unlike Redis(connection_pool=...), this client closes its connections with itself.
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options))
