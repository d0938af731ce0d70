from __future__ import annotations

import logging
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from gw_celery import devserver
from gw_celery.cluster import poller, queue_lengths, records
from tests.processes import eventually

QUEUES = {"model": ["gpu.A100.model"]}


@pytest.fixture
def app(gw_broker: devserver.Server) -> Iterator[Celery]:
    with Celery("demand", broker=gw_broker.broker_url, set_as_current=False) as app:
        yield app


@pytest.fixture
def looking(app: Celery) -> Iterator[poller.Demand]:
    looking = poller.Demand(app, QUEUES, "gpu@one")
    yield looking
    looking.close()
    assert not looking._thread.is_alive()


def messages(looking: poller.Demand) -> int | None:
    reading = looking.latest()
    return None if reading is None or reading.lengths is None else reading.lengths["model"].messages


def test_the_thread_reads_what_waits(app: Celery, looking: poller.Demand) -> None:
    looking.start()
    assert eventually(lambda: messages(looking) == 0)
    app.send_task("any", queue="gpu.A100.model")
    assert eventually(lambda: messages(looking) == 1)


def test_it_calls_back_when_it_has_read(app: Celery) -> None:
    has_read = threading.Event()
    looking = poller.Demand(app, QUEUES, "gpu@one", has_read.set)
    looking.start()
    assert has_read.wait(10)
    looking.close()


def test_workers_meet_where_they_look(app: Celery, looking: poller.Demand) -> None:
    other = poller.Demand(app, QUEUES, "gpu@two")
    other.tell({"model": records.Facts(worker="gpu@two", capacity=3)})
    other.start()
    looking.start()

    def known() -> list[str]:
        reading = looking.latest()
        peers = {} if reading is None else reading.peers or {}
        return [one.worker for one in peers.get("model", ())]

    assert eventually(lambda: known() == ["gpu@two"])
    other.close()
    assert eventually(lambda: known() == [])


class Broker:
    """A broker that comes and goes: stands in for ``demand.Source``."""

    def __init__(self) -> None:
        self.is_up = True
        self.opened = self.closed = 0

    def __call__(self, *_: Any) -> Broker:
        self.opened += 1
        return self

    def read(self, mine: Any) -> poller.Reading:
        if not self.is_up:
            raise ConnectionResetError("gone")
        counted = {"model": queue_lengths.Length(1)}
        return poller.Reading(at=time.monotonic(), lengths=counted, peers=None)

    def leave(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    monkeypatch.setattr(poller, "Source", broker)
    return broker


def test_a_broker_that_is_away_is_told_once_and_tried_ever_seldomer(
    app: Celery, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    looking = poller.Demand(app, QUEUES, "gpu@one")
    broker.is_up = False
    with caplog.at_level(logging.INFO):
        assert [looking._round() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 16.0, 16.0]
        broker.is_up = True
        assert looking._round() == 1.0
    assert [one.message.split(":")[0] for one in caplog.records] == [
        "the lengths of the queues cannot be read, so that the pool keeps its size",
        "the broker tells again how long the queues are",
    ]
    assert (broker.opened, broker.closed) == (7, 6)
    broker.is_up = False
    assert looking._round() == 1.0


def test_workers_that_come_together_meet_before_anything_is_decided(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(poller, "time", clock)

    def read(mine: Any) -> poller.Reading:
        if not broker.is_up:
            raise ConnectionResetError("gone")
        counted = {"model": queue_lengths.Length(1)}
        return poller.Reading(at=clock.now, lengths=counted, peers={"model": ()})

    monkeypatch.setattr(broker, "read", read)
    looking = poller.Demand(app, QUEUES, "gpu@one")

    def seconds_until_known() -> float:
        began = clock.now
        while messages(looking) is None and clock.now < began + 60.0:
            clock.now += looking._round()
        return clock.now - began

    assert 2.0 <= seconds_until_known() <= 4.0
    broker.is_up = False
    for _ in range(4):  # another of those that it was away for waits for 8 s, or as long again
        clock.now += looking._round()
    broker.is_up = True
    assert 16.0 <= seconds_until_known() <= 20.0


def test_what_was_read_long_ago_is_not_known(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = poller.Demand(app, QUEUES, "gpu@one")
    assert looking.latest() is None
    looking._round()
    assert messages(looking) == 1
    monkeypatch.setattr(poller, "_STALE", 0.0)
    assert looking.latest() is None


def test_it_looks_more_often_while_nothing_is_loaded(app: Celery, broker: Broker) -> None:
    looking = poller.Demand(app, QUEUES, "gpu@one")
    assert looking._round() == 1.0
    looking.at_zero(is_at_zero=True)
    assert looking._round() < 0.5


def test_from_the_moment_on_that_nothing_is_loaded(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "_ROUND", 60.0)
    monkeypatch.setattr(poller, "_ROUND_AT_ZERO", 60.0)
    looks: list[float] = []
    looking = poller.Demand(app, QUEUES, "gpu@one", lambda: looks.append(time.monotonic()))
    looking.start()
    eventually(lambda: len(looks) == 1)
    looking.at_zero(is_at_zero=True)
    eventually(lambda: len(looks) == 2)
    looking.at_zero(is_at_zero=True)
    looking.close()
    assert (len(looks), looking._thread.is_alive()) == (2, False)


def test_a_thread_that_waits_for_the_broker_holds_nobody_up(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = threading.Event()
    monkeypatch.setattr(broker, "read", lambda mine: frozen.wait(30))
    monkeypatch.setattr(poller, "_FAREWELL", 0.05)
    looking = poller.Demand(app, QUEUES, "gpu@one")
    looking.start()
    looking.close()
    assert looking._thread.is_alive()
    frozen.set()
    looking._thread.join(10)
    assert not looking._thread.is_alive()
