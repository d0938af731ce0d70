"""Where the estimates are: nothing connects here."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.cluster import redis as cluster_redis


@pytest.fixture(autouse=True)
def _no_servers_of_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def of(
    broker: str, backend: str = "cache+memory://", **settings: Any
) -> cluster_redis.Board | None:
    with Celery(broker=broker, backend=backend, set_as_current=False) as app:
        app.conf.update(settings)
        return cluster_redis.of(app, 0.25)


def options(found: cluster_redis.Board | None) -> dict[str, Any]:
    assert found is not None
    given: dict[str, Any] = found.client.connection_pool.connection_kwargs
    return given


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", {"host": "localhost", "port": 6379, "db": 0}),
        (
            "redis://me:se%40cret@there:6380/3",
            {"host": "there", "port": 6380, "db": 3, "username": "me", "password": "se@cret"},
        ),
        ("redis+socket:///run/x.sock?virtual_host=2", {"path": "/run/x.sock", "db": 2}),
        ("rediss://there/1?ssl_cert_reqs=required", {"host": "there", "db": 1}),
    ],
)
def test_the_brokers_redis_is_found_in_every_form(url: str, expected: dict[str, Any]) -> None:
    found = options(of(url))
    assert {key: found[key] for key in expected} == expected
    assert found["socket_timeout"] == 0.25
    assert found["decode_responses"] is True


def test_a_socket_and_tls_have_connections_of_their_own() -> None:
    for url, cls in (
        ("redis+socket:///run/x.sock", redis.UnixDomainSocketConnection),
        ("rediss://there", redis.SSLConnection),
    ):
        found = of(url)
        assert found is not None
        assert found.client.connection_pool.connection_class is cls
        assert found.client.connection_pool.make_connection() is not None


def test_the_broker_goes_before_the_results() -> None:
    assert options(of("redis://there/1", "redis://here/2"))["host"] == "there"
    found = of("amqp://", "redis://here/2")
    assert options(found)["host"] == "here"
    assert options(found)["socket_timeout"] == 0.25


@pytest.mark.parametrize(
    ("broker", "backend"), [("amqp://", "rpc://"), ("memory://", "cache+memory://")]
)
def test_without_a_redis_there_is_none(broker: str, backend: str) -> None:
    assert of(broker, backend) is None


def test_keys_begin_as_the_brokers_do() -> None:
    found = of("redis://", broker_transport_options={"global_keyprefix": "p:"})
    assert found is not None
    assert found.key("wait", "q") == "p:gw:wait:q"
