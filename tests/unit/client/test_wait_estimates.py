"""Reading the estimates: once a second, within bounds, and never on an event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import redis
from celery import Celery

from gw_celery.client import queue_time
from gw_celery.testing import eventually
from gw_celery.transport import find


class Client:
    """A Redis with one value for every key, which may be away."""

    def __init__(self, text: str | None = None) -> None:
        self.text = text
        self.asked: list[str] = []
        self.threads: set[int] = set()
        self.is_away = False

    def get(self, key: str) -> str | None:
        self.asked.append(key)
        self.threads.add(threading.get_ident())
        if self.is_away:
            raise redis.ConnectionError("away")
        return self.text


class Shared(find.SharedRedis):
    """The Redis of such a client."""

    def __init__(self, client: Client, prefix: str = "") -> None:
        super().__init__(None, prefix, 0.25)
        self._client = client

    def close(self) -> None: ...


class Clock:
    """Stands still until a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_estimate_is_read_once_a_second(clock: Clock) -> None:
    client = Client("12.5")
    found = queue_time.Waits(Shared(client, "p:"), clock)
    assert [found.estimate("q") for _ in range(5)] == [12.5] * 5
    assert client.asked == ["p:gw:wait:q"]
    clock.now += 1.1
    client.text = "3"
    assert found.estimate("q") == 3.0
    assert found.estimate("r") == 3.0
    assert len(client.asked) == 3


@pytest.mark.parametrize("text", [None, "soon", "nan", "1e300"])
def test_that_there_is_no_estimate_is_good_for_a_second_too(clock: Clock, text: str | None) -> None:
    client = Client(text)
    found = queue_time.Waits(Shared(client), clock)
    assert [found.estimate("q") for _ in range(5)] == [None] * 5
    assert len(client.asked) == 1


def test_a_redis_that_is_away_admits(clock: Clock) -> None:
    client = Client("99")
    client.is_away = True
    found = queue_time.Waits(Shared(client), clock)
    assert [found.estimate("q") for _ in range(5)] == [None] * 5
    assert len(client.asked) == 1
    clock.now += 1.1
    client.is_away = False
    assert found.estimate("q") == 99.0


def test_an_event_loop_reads_nothing_and_learns_from_a_thread() -> None:
    client = Client("12.5")
    found = queue_time.Waits(Shared(client))

    async def ask() -> None:
        assert found.estimate("q") is None, "no estimate has been read yet"

    async def told() -> float | None:
        return found.estimate("q")

    asyncio.run(ask())
    assert eventually(lambda: asyncio.run(told())) == 12.5
    assert threading.get_ident() not in client.threads


def test_a_thread_that_reads_keeps_no_other_waiting(clock: Clock) -> None:
    client, reading, go_on = Client("7"), threading.Event(), threading.Event()
    found = queue_time.Waits(Shared(client), clock)
    assert found.estimate("q") == 7.0
    clock.now += 1.1
    get = client.get

    def slowly(key: str) -> Any:
        reading.set()
        assert go_on.wait(20)
        return get(key)

    client.get = slowly  # type: ignore[method-assign]
    reader = threading.Thread(target=found.estimate, args=("q",))
    reader.start()
    assert reading.wait(20)
    assert found.estimate("q") == 7.0
    go_on.set()
    reader.join()
    eventually(lambda: len(client.asked) == 2)


def test_without_a_redis_there_is_no_estimate() -> None:
    assert queue_time.Waits(None).estimate("q") is None
    with Celery(broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        assert queue_time.waits_of(app).estimate("q") is None
        assert queue_time.waits_of(app) is queue_time.waits_of(app)
