"""What a broker is: a Redis has needs of its own, and RabbitMQ prefers some consumers."""

from __future__ import annotations

from typing import Any


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
