"""Which source a result backend has; what a source over Redis sees is in the integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from celery import Celery

from gw_celery.client import result_sources
from gw_celery.replica import result_backends
from tests.unit.runtime.tracers import Around, Reports


class Reader:
    """Stands for the thread of a source that reads nothing here."""

    def submit(self, send: Callable[[], Any]) -> Future[Any]:
        raise NotImplementedError

    def close(self, timeout: float) -> None: ...


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
        assert type(result_sources.of(app, 0.5, Reader)) is expected


def test_a_server_that_falls_silent_is_given_up_though_a_call_is_given_up_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(result_sources, "ANSWER_TIMEOUT", 0.1)

    async def connections() -> int:
        connected: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.put_nowait(writer)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with Celery("proj", broker="memory://", backend=url, set_as_current=False) as app:
            source = result_sources.of(app, 0.5, Reader)
            other: result_sources.Waiter = Future()
            source.add("1", Future())
            source.add("2", other)
            async with asyncio.timeout(10):
                writers = [await connected.get()]
                source.remove("2", other)
                writers += [await connected.get(), await connected.get()]
        server.close()
        for writer in writers:
            writer.close()
        return len(writers)

    assert asyncio.run(connections()) == 3
