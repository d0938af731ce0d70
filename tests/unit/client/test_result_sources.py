"""Which source a result backend has; what a source over Redis sees is in the integration tests."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import Future
from typing import Any

import pytest
from celery import Celery

from gw_celery.client import result_sources
from gw_celery.replica import result_backends
from tests.processes import environment
from tests.unit.runtime.tracers import DEADLINE, Around, Reports


def source_of(app: Celery) -> result_sources.Source:
    return result_sources.of(app, 0.5)


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
        assert type(source_of(app)) is expected


def test_a_server_that_accepts_and_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(result_sources, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(result_sources, "FIRST_DELAY", 0.001)
    again = asyncio.Event()
    connections: list[asyncio.StreamWriter] = []

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if len(connections) == 2:
            again.set()

    async def act() -> None:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            app = Celery("proj", backend=f"redis://127.0.0.1:{port}", set_as_current=False)
            source = source_of(app)
            source.add("1", Future())
            assert source._task is not None
            try:
                async with asyncio.timeout(DEADLINE):
                    await again.wait()
            finally:
                source._task.cancel()
                await asyncio.wait([source._task])
                for one in connections:
                    one.close()
                    await one.wait_closed()

    asyncio.run(act())


def test_a_process_that_waits_for_no_answer_does_not_load_the_redis_clients() -> None:
    code = """
import sys
import gw_celery as gw
app = gw.App("x")
@app.remote
async def square(x): ...
sys.exit("redis" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == 0
