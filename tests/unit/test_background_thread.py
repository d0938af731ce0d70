from __future__ import annotations

import logging
import math
import signal
import threading
import time

import pytest

from gw_celery.background_thread import BackgroundThread, Outage
from gw_celery.testing import eventually


class Counting(BackgroundThread):
    """Counts its rounds, and fails while it is told to."""

    def __init__(self, period: float = 0.01) -> None:
        super().__init__("counting", "nothing can be counted", period=period)
        self.rounds = 0
        self.has_left = self.is_away = False

    def run_round(self) -> None:
        self.rounds += 1
        if self.is_away:
            raise ConnectionError("gone")

    def leave(self) -> None:
        self.has_left = True


def test_a_round_comes_every_period_until_it_is_closed() -> None:
    thread = Counting()
    thread.start()
    thread.start()
    eventually(lambda: thread.rounds >= 3)
    assert thread.close()
    assert thread.has_left
    rounds = thread.rounds
    time.sleep(0.05)
    assert thread.rounds == rounds
    thread.start()
    assert thread.rounds == rounds, "what is closed does not start again"


def test_an_outage_is_logged_when_it_begins_and_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread = Counting()
    thread.is_away = True
    with caplog.at_level(logging.INFO):
        thread.start()
        eventually(lambda: thread.rounds >= 5)
        thread.is_away = False
        rounds = thread.rounds
        eventually(lambda: thread.rounds >= rounds + 5)
        thread.close()
    assert caplog.messages == [
        "nothing can be counted: ConnectionError('gone'); it is tried again until it works",
        "over after 0 s: nothing can be counted",
    ]


def test_without_a_period_it_waits_until_it_is_woken() -> None:
    thread = Counting(math.inf)
    thread.start()
    eventually(lambda: thread.rounds == 1)
    time.sleep(0.05)
    assert thread.rounds == 1
    thread.wake()
    eventually(lambda: thread.rounds == 2)
    assert thread.close()


def test_one_that_hangs_is_left_behind() -> None:
    free = threading.Event()

    class Hanging(Counting):
        def run_round(self) -> None:
            free.wait(30)

    thread = Hanging()
    thread.start()
    assert not thread.close(0.05)
    free.set()
    eventually(lambda: thread.has_left)


def test_one_that_never_started_has_nothing_to_close() -> None:
    thread = Counting()
    assert thread.close()
    assert not thread.has_left


def test_an_outage_that_never_was_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage(logging.getLogger(__name__), "it cannot be read")
    outage.end()
    assert caplog.messages == []


def test_the_handler_of_a_signal_may_end_a_thread_that_it_interrupts_the_start_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a cold shutdown: the pool ends in the handler, wherever its loop was."""
    start = threading.Thread.start

    work = Counting(period=60.0)

    def end(*_: object) -> None:
        work.start()
        work.wake()
        work.close(5.0)

    def start_interrupted(thread: threading.Thread) -> None:
        signal.raise_signal(signal.SIGQUIT)
        start(thread)

    before = signal.signal(signal.SIGQUIT, end)
    try:
        monkeypatch.setattr(threading.Thread, "start", start_interrupted)
        work.start()
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert work.is_closed
    assert work.close(5.0)
