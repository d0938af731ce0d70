"""A child that leaves closes what it published over: the broker has taken the last of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, pools

import gw_celery as gw
from tests import child_harness


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The only pool there is, for so long: the apps of other tests keep theirs."""
    monkeypatch.setattr(pools, "connections", pools.Connections(limit=10))
    made = pools.connections[Connection("memory://")]
    yield made
    made.force_close_all()


def leave_after_use(app: gw.App, pool: Any, count: int) -> list[Any]:
    """Have a child leave that used so many connections of ``pool`` at the same time."""
    with child_harness.child_of(app):
        used = [pool.acquire(block=True) for _ in range(count)]
        for connection in used:
            connection.connect()
            connection.release()
    return used


def test_every_connection_that_was_used_is_closed(app: gw.App, pool: Any) -> None:
    used = leave_after_use(app, pool, 3)
    assert [connection.connected for connection in used] == [False] * 3


def test_nothing_is_connected_for_it(app: gw.App, pool: Any) -> None:
    leave_after_use(app, pool, 0)
    with pool.acquire(block=True) as unused:
        assert not unused.connected


def test_a_broker_that_does_not_answer_is_not_waited_for(
    app: gw.App, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, warned = threading.Event(), threading.Event()

    class Warned(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "did not answer" in record.getMessage():
                warned.set()

    def close(self: Any) -> None:
        closing.set()
        assert warned.wait(20), "it goes on without an answer; its loop waits for its threads"

    monkeypatch.setattr(Connection, "close", close)
    root, handler = logging.getLogger(), Warned()
    root.addHandler(handler)
    try:
        leave_after_use(app, pool, 1)
    finally:
        root.removeHandler(handler)
    assert closing.is_set()
    assert warned.is_set()


def test_a_connection_that_is_lost_stops_no_other(
    app: gw.App, pool: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any) -> None:
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "close", fail)
        leave_after_use(app, pool, 1)
    assert "could not be closed: ConnectionResetError('gone')" in caplog.text
