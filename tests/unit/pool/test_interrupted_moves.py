"""A cold shutdown in the middle of a move: Celery does it in the handler of a signal."""

from __future__ import annotations

import functools
import itertools
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state

from tests.pool_harness import Harness, interrupted_move


def shut_down_cold(harness: Harness) -> None:
    """What ``celery.apps.worker.on_cold_shutdown`` does."""
    harness.pool.flush()
    harness.pool.poll()
    for sent in harness.requests:
        if sent.heard and sent.heard[-1] == "accepted":
            sent.handle.terminate(signal.SIGTERM)
    state.should_terminate = True
    harness.pool.stop()


def is_interrupted(harness: Harness, when: str, step: int) -> bool:
    """Shut down in a move that follows from an event; whether the move has so many steps."""
    child = harness.child(0)
    first = harness.submit()
    child.accept(first)
    is_taking = when in ("taken", "taken again")
    second: Any = None if when == "submit" or is_taking else harness.submit()
    if when == "done":
        child.accept(second)
    failures: list[BaseException] = []

    def handle(*_: object) -> None:
        try:
            shut_down_cold(harness)
        except BaseException as exc:
            failures.append(exc)

    before = signal.signal(signal.SIGQUIT, handle)
    try:
        interrupt = functools.partial(signal.raise_signal, signal.SIGQUIT)
        with interrupted_move(step, interrupt, is_taking=is_taking) as reached:
            if second is None:  # it must not raise: Celery's consumer would reject the message
                second = harness.submit(is_redelivered=when == "taken again")
            elif when == "accept":
                child.accept(second)
            else:
                child.done(second)
    finally:
        signal.signal(signal.SIGQUIT, before)
    harness.terminate()
    assert failures == []
    for sent in (first, second):
        assert sent.heard.count("accepted") <= 1
        assert len([word for word in sent.heard if word != "accepted"]) <= 1
    assert not reached or first.heard == ["accepted", "Terminated"]
    return bool(reached)


@pytest.mark.parametrize("when", ["submit", "taken", "taken again", "accept", "done"])
def test_a_cold_shutdown_in_the_middle_of_a_move_answers_each_input_once(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(state, "should_terminate", None)
    for step in itertools.count():
        with Harness(cancel_timeout=0.2).running() as harness:
            state.should_terminate = None
            harness.child(0).ready()
            harness.advance(1)
            if not is_interrupted(harness, when, step):
                break
    assert step > 1, "the move calls nothing that can be interrupted"


def test_a_cold_shutdown_in_a_handler_waits_for_no_decision_of_the_autoscaler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread, where there is no event loop, may wait for what the handler interrupted."""
    monkeypatch.setattr(state, "should_terminate", None)
    ended: list[str] = []
    with Harness(cancel_timeout=0.2).running() as harness:
        harness.pool.autoscaler = SimpleNamespace(end=lambda: ended.append("ended"))
        shut_down_cold(harness)
        assert ended == []
        harness.pool.close()
        harness.terminate()
        assert ended == ["ended"]
