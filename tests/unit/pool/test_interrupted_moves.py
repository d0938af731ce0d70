"""A cold shutdown in the middle of a move: Celery does it in the handler of a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from celery.worker import state

from tests.pool_harness import Harness

STEPS = ["_count", "_move_in_queue", "_move_slot", "_set_limits"]


@pytest.fixture
def harness() -> Iterator[Harness]:
    with Harness(cancel_timeout=0.2).running() as made:
        made.child(0).ready()
        made.advance(1)
        yield made


def shut_down_cold(harness: Harness, requests: list[Any]) -> None:
    """What ``celery.apps.worker.on_cold_shutdown`` does."""
    harness.pool.flush()
    harness.pool.poll()
    for sent in requests:
        if sent.heard and sent.heard[-1] == "accepted":
            sent.handle.terminate(signal.SIGTERM)
    state.should_terminate = True
    harness.pool.stop()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["submit", "accept", "done"])
def test_a_cold_shutdown_in_the_middle_of_a_move_answers_each_input_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    child = harness.child(0)
    first = harness.submit()
    child.accept(first)
    second = None if when == "submit" else harness.submit()
    if when == "done":
        child.accept(second)
    table: Any = harness.pool.supervisor.requests.table
    was, interrupted = getattr(table, step), []
    failures: list[BaseException] = []

    def handle(*_: object) -> None:
        try:
            shut_down_cold(harness, [sent for sent in (first, second) if sent is not None])
        except BaseException as exc:
            failures.append(exc)

    def interrupt_once(*args: Any) -> Any:
        if not interrupted:
            interrupted.append(step)
            signal.raise_signal(signal.SIGQUIT)
        return was(*args)

    monkeypatch.setattr(table, step, interrupt_once)
    monkeypatch.setattr(state, "should_terminate", None)
    before = signal.signal(signal.SIGQUIT, handle)
    try:
        if when == "submit":
            second = harness.submit()
        elif when == "accept":
            child.accept(second)
        else:
            child.done(second)
    finally:
        signal.signal(signal.SIGQUIT, before)
    harness.terminate()
    assert (interrupted, failures) == ([step], [])
    for sent in (first, second):
        assert sent.heard.count("accepted") <= 1
        assert len([word for word in sent.heard if word != "accepted"]) <= 1
    assert first.heard == ["accepted", "Terminated"]
