"""Which source a result backend has; what a source over Redis sees is in the integration tests."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from gw_celery.client import result_sources
from gw_celery.replica import result_backends
from tests.unit.runtime.tracers import Around, Reports


@pytest.mark.parametrize("is_replica", [False, True])
@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("redis://db.example:1", result_sources.RedisSource),
        ("rediss://db.example:1?ssl_cert_reqs=required", result_sources.RedisSource),
        ("sentinel://db.example:1", result_sources.PolledSource),
        ("cache+memory://", result_sources.PolledSource),
        ("rpc://", result_sources.RpcSource),
    ],
)
def test_redis_notifies_and_every_other_backend_is_asked(
    backend: str, expected: type[Any], is_replica: bool
) -> None:
    with Celery("proj", broker="memory://", backend=backend, set_as_current=False) as app:
        if is_replica:
            result_backends.install(app, Around(), 5, Reports())
        assert type(result_sources.of(app, 0.5)) is expected
