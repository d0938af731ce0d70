"""Whether a broker is a Redis, which has needs of its own."""

from __future__ import annotations

from typing import Any


def redis_transport(connection: Any) -> Any | None:
    """Return kombu's transport class of ``connection`` where it speaks to a Redis, in any form.

    Sentinel is one, too. Nothing connects.
    """
    transport = connection.get_transport_cls()
    return transport if transport.driver_type == "redis" else None
