"""Where the workers and clients of a project meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError

from gw_celery import testing
from gw_celery.transport import find

#: No server listens there, and nothing connects to it.
UNREACHABLE = "redis://127.0.0.1:1/0"
NONE = "cache+memory://"


@pytest.fixture(autouse=True)
def _no_servers_of_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def found(broker: str, backend: str = NONE, **settings: Any) -> find.SharedRedis | None:
    app = Celery("unit", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)
    return find.redis_of(app, 0.25)


@pytest.mark.parametrize(
    ("broker", "backend"),
    [
        ("memory://", NONE),
        ("amqp://guest@127.0.0.1:1//", NONE),
        ("amqp://guest@127.0.0.1:1//", "rpc://"),
    ],
)
def test_without_a_redis_there_is_none(broker: str, backend: str) -> None:
    assert found(broker, backend) is None


@pytest.mark.parametrize(
    ("broker", "backend", "kind"),
    [
        (UNREACHABLE, NONE, find.BrokerRedis),
        (UNREACHABLE, UNREACHABLE, find.BrokerRedis),
        ("rediss://127.0.0.1:1/0", UNREACHABLE, find.BrokerRedis),
        ("redis+socket:///run/absent.sock", NONE, find.BrokerRedis),
        ("sentinel://127.0.0.1:1", NONE, find.BrokerRedis),
        ("memory://", UNREACHABLE, find.ResultsRedis),
        ("amqp://guest@127.0.0.1:1//", "sentinel://127.0.0.1:1", find.ResultsRedis),
    ],
)
def test_the_broker_comes_before_the_results_and_nothing_connects(
    broker: str, backend: str, kind: type
) -> None:
    assert type(found(broker, backend)) is kind


@pytest.mark.parametrize(
    ("broker", "backend"),
    [(UNREACHABLE, NONE), ("memory://", UNREACHABLE), ("memory://", "redis+socket:///no")],
)
def test_a_redis_that_is_away_is_an_error_of_who_asks_it(broker: str, backend: str) -> None:
    shared = found(broker, backend)
    assert shared is not None
    with pytest.raises((redis.ConnectionError, OperationalError)):
        shared.client().get("a")


def test_it_is_the_database_of_the_broker_or_that_of_the_results(
    redis_server: testing.Server, closing: ExitStack
) -> None:
    for broker, database in ((redis_server.broker_url, 0), ("memory://", 1)):
        shared = found(broker, redis_server.result_url)
        assert shared is not None
        closing.callback(shared.close)
        shared.client().set(f"where{database}", "here")
        with redis.Redis(unix_socket_path=str(redis_server.socket), db=database) as client:
            assert client.get(f"where{database}") == b"here"


def test_it_answers_within_its_time_and_connects_anew_when_it_was_closed(
    redis_server: testing.Server, closing: ExitStack
) -> None:
    shared = found(redis_server.broker_url)
    assert isinstance(shared, find.BrokerRedis)
    closing.callback(shared.close)
    client = shared.client()
    assert shared.client() is client
    assert client.connection_pool.connection_kwargs["socket_timeout"] == 0.25
    shared.close()
    assert shared.client().ping()
    assert shared.client() is not client


def test_keys_begin_as_the_brokers_or_the_results_do_and_no_prefix_is_put_twice(
    redis_server: testing.Server, closing: ExitStack
) -> None:
    options = {
        "broker_transport_options": {"global_keyprefix": "p:"},
        "result_backend_transport_options": {"global_keyprefix": "r"},
    }
    keys = ((redis_server.broker_url, 0, "p:gw:wait:q"), ("memory://", 1, "r_gw:wait:q"))
    for broker, database, key in keys:
        shared = found(broker, redis_server.result_url, **options)
        assert shared is not None
        closing.callback(shared.close)
        assert shared.key("wait", "q") == key
        shared.client().set(key, "1")
        with redis.Redis(unix_socket_path=str(redis_server.socket), db=database) as client:
            assert client.get(key) == b"1"


@pytest.mark.parametrize("prefix", ["", "tenant:"])
def test_the_lists_of_a_queue_are_those_that_kombu_writes(
    redis_server: testing.Server, prefix: str, closing: ExitStack
) -> None:
    options = {"priority_steps": [0, 5], "sep": ":", "global_keyprefix": prefix}
    shared = found(redis_server.broker_url, broker_transport_options=options)
    assert isinstance(shared, find.BrokerRedis)
    closing.callback(shared.close)
    shared.client()
    assert shared.lists("mail") == [f"{prefix}mail", f"{prefix}mail:5"]
    with shared._app.connection_for_write() as connection:
        connection.SimpleQueue("mail").put(1, priority=5)
    assert shared.client().llen(f"{prefix}mail:5") == 1
