from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery import devserver
from gw_celery.transport.find import redis_of

#: Nobody listens there, and nothing connects to it.
NOBODY = "redis://127.0.0.1:1/0"


def app_of(broker: str, backend: str) -> Celery:
    return Celery("unit", broker=broker, backend=backend, set_as_current=False)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("broker", ["memory://", "amqp://guest@127.0.0.1:1//"])
def test_without_a_redis_there_is_none(broker: str) -> None:
    assert redis_of(app_of(broker, "cache+memory://")) is None


@pytest.mark.parametrize(
    ("broker", "backend"),
    [
        ("memory://", NOBODY),
        (NOBODY, "cache+memory://"),
        (NOBODY, NOBODY),
        ("sentinel://127.0.0.1:1", "cache+memory://"),
    ],
)
def test_finding_it_connects_to_nothing(broker: str, backend: str) -> None:
    assert redis_of(app_of(broker, backend)) is not None


def test_a_redis_that_is_away_is_an_error_of_who_connects() -> None:
    connect: Any = redis_of(app_of("memory://", NOBODY))
    with pytest.raises(redis.ConnectionError):
        connect().get("a")


def test_the_result_backend_comes_before_the_broker(
    redis_server: devserver.Server, redis_url: str, result_url: str, closing: ExitStack
) -> None:
    app = app_of(redis_url, result_url)
    connect: Any = redis_of(app)
    client = closing.enter_context(connect())
    closing.callback(app.backend.result_consumer.stop)
    client.set("where", "results")
    assert client.connection_pool.connection_kwargs["db"] == 1


def test_the_brokers_redis_serves_after_its_connection_was_closed(
    redis_url: str, closing: ExitStack
) -> None:
    # One of its own, undone before the broker's: the shared one would set it again at the end.
    closing.enter_context(pytest.MonkeyPatch.context()).delenv("CELERY_RESULT_BACKEND")
    connect: Any = redis_of(app_of(redis_url, "cache+memory://"))
    client = connect()
    closing.callback(client.connection_pool.disconnect)
    with client.pipeline() as pipe:
        pipe.incrby("deaths", 2)
        pipe.expire("deaths", 60)
        pipe.execute()
    assert int(client.get("deaths")) == 2
