from __future__ import annotations

import os
import signal
import threading

import pytest

from gw_celery.worker import stop_signal


def test_sigterm_during_a_load_is_kept_for_the_check_and_given_back() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with stop_signal.heeding(stop_signal.Bell()) as check:
            check()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SystemExit) as caught:
                check()
        assert caught.value.code == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_bell_is_heard_by_every_child_that_asks() -> None:
    bell = stop_signal.Bell()
    with stop_signal.heeding(bell) as first, stop_signal.heeding(bell) as second:
        first()
        bell.ring()
        for check in (first, second, first):
            with pytest.raises(SystemExit):
                check()


def test_a_worker_in_a_thread_of_a_test_may_load_too() -> None:
    raised: list[BaseException] = []

    def load() -> None:
        try:
            with stop_signal.heeding(stop_signal.Bell()) as check:
                check()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert raised == []
