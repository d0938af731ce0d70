"""The moments of a thread at which its body may be interrupted; the rest is in test_child."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from gw_celery.client import execution
from gw_celery.replica import tracer
from tests.unit.runtime.tracers import DEADLINE, an_input, keep


def interrupt(input: tracer.Input, how: str) -> None:
    input.limit(5) if how == "limit" else input.stop()


outcomes = pytest.mark.parametrize(
    ("how", "expected"), [("limit", SoftTimeLimitExceeded), ("stop", execution.Revoked)]
)


Elsewhere: TypeAlias = Callable[[Callable[[], None]], None]


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Act in another thread, and wait for it.

    It runs already: a thread that is interrupted while it starts another one leaves the bookkeeping
    of ``threading`` broken.
    """
    asked: queue.SimpleQueue[tuple[Callable[[], None], threading.Lock] | None] = queue.SimpleQueue()

    def run() -> None:
        while (request := asked.get()) is not None:
            act, done = request
            act()
            done.release()

    def elsewhere(act: Callable[[], None]) -> None:
        if threading.current_thread() is other:  # what acts there uses the lock, too
            act()
            return
        done = threading.Lock()
        done.acquire()
        asked.put((act, done))
        done.acquire(timeout=DEADLINE)

    other = threading.Thread(target=run, daemon=True)
    other.start()
    yield elsewhere
    asked.put(None)
    other.join(DEADLINE)


class Switching:
    """The lock of an input; around its n-th use another thread comes to its turn, and acts."""

    def __init__(self, moment: int, act: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.left = moment
        self.act = act

    def __enter__(self) -> None:
        self.switch()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.switch()

    def switch(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


@outcomes
@pytest.mark.parametrize("moment", range(1, 7))
def test_whenever_a_body_in_a_thread_is_interrupted_its_storing_is_not(
    moment: int, how: str, expected: type[BaseException], elsewhere: Elsewhere
) -> None:
    """Python raises in a thread where it switches threads: where a body begins and ends, too."""
    input = an_input()

    def act() -> None:
        elsewhere(lambda: interrupt(input, how))

    input._lock = Switching(moment, act)  # type: ignore[assignment]

    def store() -> str:
        act()
        return "stored"

    outcome = keep(lambda: input.run_body(lambda: "answer", (), {}))
    assert outcome == "answer" or isinstance(outcome, expected), repr(outcome)
    assert keep(store) == "stored"
