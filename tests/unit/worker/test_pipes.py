from __future__ import annotations

import os
import signal
import threading

import pytest

from gw_celery.worker import pipes


def test_a_worker_hears_why_its_children_cannot_load() -> None:
    made = pipes.Pipes()
    made.report("Model: no such file")
    made.report("Model: é\nand a second line")
    assert made.failures() == [
        pipes.Failure(pid=os.getpid(), reason="Model: no such file"),
        pipes.Failure(pid=os.getpid(), reason="Model: é\nand a second line"),
    ]


def test_a_reason_without_end_does_not_block_the_child_that_gives_it() -> None:
    made = pipes.Pipes()
    for _ in range(4):
        made.report("é" * 1_000_000)
    assert [len(failure.reason) for failure in made.failures()] == [2000] * 4


def test_a_worker_that_stops_does_not_wait_for_failures() -> None:
    made = pipes.Pipes()
    made.never_wait()
    assert made.failures() == []


def test_a_worker_without_an_event_loop_waits_for_them() -> None:
    made = pipes.Pipes()
    heard: list[pipes.Failure] = []
    thread = threading.Thread(target=lambda: heard.extend(made.failures()))
    thread.start()
    made.report("late")
    thread.join(30)
    assert [failure.reason for failure in heard] == ["late"]


def test_sigterm_during_a_load_is_kept_for_the_check_and_given_back() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pipes.Pipes().stop_check() as check:
            check()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SystemExit) as caught:
                check()
        assert caught.value.code == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_that_stops_is_noticed_by_every_child_that_asks() -> None:
    made = pipes.Pipes()
    with made.stop_check() as first, made.stop_check() as second:
        first()
        made.stop()
        for check in (first, second, first):
            with pytest.raises(SystemExit):
                check()


def test_a_worker_in_a_thread_of_a_test_may_load_too() -> None:
    raised: list[BaseException] = []

    def load() -> None:
        try:
            with pipes.Pipes().stop_check() as check:
                check()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert raised == []
