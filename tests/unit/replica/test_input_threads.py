"""How a limit or a revocation reaches a body that runs in a thread, and nothing else there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.serialization import get_pickleable_exception

from gw_celery.client import execution
from gw_celery.replica import input as replica_input
from tests.unit.runtime.tracers import DEADLINE, an_input, keep


class Thread:
    """An input whose tracer runs in a thread."""

    def __init__(self) -> None:
        self.one = an_input()
        self.busy = threading.Event()
        self.go = threading.Event()
        self.outcome: Any = None
        self.thread: threading.Thread

    def work(self) -> str:
        """Compute until told to go on, as code that never waits does."""
        self.busy.set()
        end = time.monotonic() + DEADLINE
        while not self.go.is_set() and time.monotonic() < end:
            pass
        self.busy.clear()
        self.go.clear()
        return "answer"

    def body(self) -> Any:
        return self.one.run_body(self.work, (), {})

    def trace(self, tracer: Callable[[], Any]) -> None:
        def run() -> None:
            self.outcome = keep(tracer)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self.busy.wait(DEADLINE)

    def end(self) -> Any:
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        return self.outcome


def interrupt(one: replica_input.InFlight, how: str) -> None:
    one.limit(5) if how == "limit" else one.stop()


outcomes = pytest.mark.parametrize(
    ("how", "expected"), [("limit", SoftTimeLimitExceeded), ("stop", execution.Revoked)]
)
hows = pytest.mark.parametrize("how", ["limit", "stop"])


@outcomes
def test_a_body_that_computes_in_a_thread_is_interrupted(
    how: str, expected: type[BaseException]
) -> None:
    held = Thread()
    held.trace(held.body)
    interrupt(held.one, how)
    assert isinstance(held.end(), expected)


def test_a_soft_limit_in_a_thread_is_celerys_own_to_whoever_stores_it() -> None:
    held = Thread()
    held.trace(held.body)
    held.one.limit(5)
    stored = get_pickleable_exception(held.end())
    assert type(stored) is SoftTimeLimitExceeded
    assert repr(stored) == "SoftTimeLimitExceeded()"


def test_a_body_in_a_thread_may_answer_after_its_soft_limit() -> None:
    held = Thread()

    def body() -> str:
        try:
            return held.work()
        except SoftTimeLimitExceeded:
            return "partial"

    held.trace(lambda: held.one.run_body(body, (), {}))
    held.one.limit(5)
    assert held.end() == "partial"


def test_a_body_in_a_thread_that_swallows_its_stop_is_not_answered() -> None:
    held = Thread()

    def body() -> str:
        try:
            return held.work()
        except execution.Revoked:
            return "I go on"

    held.trace(lambda: held.one.run_body(body, (), {}))
    held.one.stop()
    assert isinstance(held.end(), execution.Revoked)


@outcomes
def test_what_comes_before_the_body_waits_for_it_in_a_thread(
    how: str, expected: type[BaseException]
) -> None:
    held, stored, began = Thread(), [], []

    def tracer() -> Any:
        stored.append(held.work())
        return held.one.run_body(lambda: began.append(1), (), {})

    held.trace(tracer)
    interrupt(held.one, how)
    held.go.set()
    assert isinstance(held.end(), expected)
    assert (stored, began) == (["answer"], [])


@hows
def test_nothing_interrupts_the_storing_of_a_result_in_a_thread(how: str) -> None:
    held = Thread()

    def tracer() -> Any:
        answer = held.one.run_body(lambda: "answer", (), {})
        return answer, held.work()

    held.trace(tracer)
    interrupt(held.one, how)
    held.go.set()
    assert held.end() == ("answer", "answer")


@hows
def test_the_next_input_of_the_thread_is_not_interrupted_for_the_last_one(how: str) -> None:
    held, following = Thread(), an_input()

    def tracer() -> Any:
        held.one.run_body(lambda: None, (), {})
        return following.run_body(held.work, (), {})

    held.trace(tracer)
    interrupt(held.one, how)
    held.go.set()
    assert held.end() == "answer"


def test_a_profiler_works_after_a_body_that_ran_in_a_thread() -> None:
    """Python 3.11 hangs in it once an exception that nobody raised was taken back."""
    program = """if True:
        import faulthandler, sys
        from gw_celery.replica import input

        faulthandler.dump_traceback_later(20, exit=True)
        one = input.InFlight(1, "proj.embed", "id-1", lambda report: None)
        one.run_body(lambda: None, (), {})
        seen = []
        sys.setprofile(lambda frame, event, arg: seen.append(event))
        (lambda: None)()
        sys.setprofile(None)
        print("call" in seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


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
            elsewhere(self.act)


def elsewhere(act: Callable[[], None]) -> None:
    other = threading.Thread(target=act, daemon=True)
    other.start()
    other.join(DEADLINE)


@outcomes
@pytest.mark.parametrize("moment", range(1, 7))
def test_whenever_a_body_in_a_thread_is_interrupted_its_storing_is_not(
    moment: int, how: str, expected: type[BaseException]
) -> None:
    """Python raises in a thread where it switches threads: where a body begins and ends, too."""
    one = an_input()
    one._lock = Switching(moment, lambda: interrupt(one, how))  # type: ignore[assignment]

    def store() -> str:
        elsewhere(lambda: interrupt(one, how))
        return "stored"

    outcome = keep(lambda: one.run_body(lambda: "answer", (), {}))
    assert outcome == "answer" or isinstance(outcome, expected)
    assert keep(store) == "stored"
