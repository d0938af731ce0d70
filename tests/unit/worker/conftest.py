"""What tests of a worker's main process share: a Redis of their own and an event loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from gw_celery import devserver


@pytest.fixture
def server(redis_server: devserver.Server, redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as client:
        yield client
        client.acl_setuser("default", enabled=True, categories=["+@all"])
        client.config_set("maxmemory", 0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An event loop that this process has, as a worker's main process does."""
    before, made = get_event_loop(), Hub()
    set_event_loop(made)
    yield made
    set_event_loop(before)
    made.close()
