from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, pools

from gw_celery.replica import main


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The only pool there is, for so long: the apps of other tests keep theirs."""
    monkeypatch.setattr(pools, "connections", pools.Connections(limit=10))
    made = pools.connections[Connection("memory://")]
    yield made
    made.force_close_all()


def connected(pool: Any, count: int) -> list[Any]:
    """Connections of ``pool`` that were used at the same time, and are not any more."""
    used = [pool.acquire(block=True) for _ in range(count)]
    for connection in used:
        connection.connect()
        connection.release()
    return used


def test_every_connection_that_was_used_is_closed(pool: Any) -> None:
    used = connected(pool, 3)
    asyncio.run(main.close_connections(5.0))
    assert [connection.connected for connection in used] == [False] * 3


def test_nothing_is_connected_for_it(pool: Any) -> None:
    asyncio.run(main.close_connections(5.0))
    with pool.acquire(block=True) as unused:
        assert not unused.connected


def test_a_broker_that_does_not_answer_is_not_waited_for(
    pool: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (used,) = connected(pool, 1)
    answers = threading.Event()
    monkeypatch.setattr(used, "close", lambda: answers.wait(60))

    async def act() -> None:
        await main.close_connections(0.05)
        answers.set()  # the loop waits for its threads

    with caplog.at_level(logging.WARNING):
        asyncio.run(act())
    assert "did not answer" in caplog.text


def test_a_connection_that_is_lost_stops_no_other(
    pool: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (used,) = connected(pool, 1)

    def fail() -> None:
        raise ConnectionResetError("gone")

    monkeypatch.setattr(used, "close", fail)
    with caplog.at_level(logging.WARNING):
        asyncio.run(main.close_connections(5.0))
    assert "gone" in caplog.text
