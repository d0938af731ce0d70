"""A worker with one of Celery's pools, and what its processes tell it while they load."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import signals
from celery.worker import state
from kombu.asynchronous import Hub

import gw_celery as gw
from gw_celery import errors
from tests.processes import eventually
from tests.unit.worker.starting import Worker, start


@pytest.fixture
def served(app: gw.App, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Start a worker whose service enters as the test says; its process has not loaded yet."""
    monkeypatch.setattr(state, "should_stop", None)
    workers: list[Worker] = []

    def make(enter: Callable[[], None] = lambda: None, *, use_eventloop: bool = True) -> Worker:
        @app.cls
        class Model:
            @gw.on_enter()
            def load(self) -> None:
                enter()

            @gw.method()
            def predict(self) -> None: ...

        worker = start(app.celery, "gpu", pool="solo")
        worker.use_eventloop = use_eventloop
        worker.begin()
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        worker.end()
    signals.worker_process_shutdown.send(sender=None)


def load() -> int | str | None:
    """Load in this process, as a child does; the exit code of one that gives up."""
    try:
        signals.worker_process_init.send(sender=None)
    except SystemExit as exc:
        return exc.code
    return None


def failing(reason: str) -> Callable[[], None]:
    def enter() -> None:
        raise OSError(reason)

    return enter


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "could not load, so this worker stops" in text]


@pytest.mark.parametrize("reason", ["no such file", "é\nand a second line"])
def test_a_worker_hears_why_its_children_cannot_load_and_stops(
    served: Callable[..., Worker], hub: Hub, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    worker = served(failing(reason))
    worker.listen(hub)
    assert [load(), load()] == [1, 1]
    next(hub.loop)
    assert len(told(caplog)) == 2
    for text in told(caplog):
        assert text.startswith(f"child pid {os.getpid()} could not load")
        assert errors.printable(reason) in text
    assert (worker.exitcode, state.should_stop) == (1, 1)


def test_a_reason_without_end_does_not_block_the_child_that_gives_it(
    served: Callable[..., Worker], hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    worker = served(failing("é" * 1_000_000))
    worker.listen(hub)
    assert [load() for _ in range(4)] == [1] * 4
    next(hub.loop)
    assert len(told(caplog)) == 4
    assert max(map(len, told(caplog))) < 2500


def test_a_worker_that_stops_does_not_wait_for_failures(served: Callable[..., Worker]) -> None:
    worker = served()
    worker.end()
    assert state.should_stop is None


def test_a_worker_without_an_event_loop_waits_for_them(
    served: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = served(failing("late"), use_eventloop=False)
    assert load() == 1
    eventually(lambda: worker.exitcode == 1)
    assert "late" in told(caplog)[0]


def test_sigterm_during_a_load_ends_it_once_what_entered_can_be_left(
    served: Callable[..., Worker],
) -> None:
    entered: list[str] = []

    def enter() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        entered.append("to its end")

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        served(enter)
        assert load() == 0
        assert entered == ["to its end"]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_that_stops_is_noticed_by_every_child_that_loads(
    served: Callable[..., Worker],
) -> None:
    worker = served()
    worker.end()
    assert [load(), load()] == [0, 0]


def test_a_worker_in_a_thread_of_a_test_may_load_too(served: Callable[..., Worker]) -> None:
    served()
    codes: list[Any] = []
    thread = threading.Thread(target=lambda: codes.append(load()))
    thread.start()
    thread.join(30)
    assert codes == [None]
