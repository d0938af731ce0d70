from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from gw_celery.client import execution
from gw_celery.replica import input as replica_input
from gw_celery.runtime import greenlet_bridge
from tests.unit.runtime.tracers import DEADLINE, an_input, keep, run


def test_a_cancellation_stays_one_in_a_process_that_ends() -> None:
    """Else the message, which the broker still has, would be acknowledged with a failure."""

    async def act() -> Any:
        input = an_input()
        input.task = asyncio.current_task()

        async def body() -> None:
            assert input.task is not None
            input.task.cancel()
            await asyncio.sleep(0)

        def trace() -> Any:
            return keep(lambda: input.run_body(lambda: greenlet_bridge.drive(body()), (), {}))

        return await greenlet_bridge.step(trace, input.take_interrupt)

    assert type(run(act)) is asyncio.CancelledError


def test_a_tasks_run_outside_any_input_is_as_written() -> None:
    def run(x: int, *, y: int) -> int:
        """Adds."""
        return x + y

    opened = replica_input.open_body(run)
    assert opened(1, y=2) == 3
    assert (opened.__name__, opened.__doc__) == ("run", "Adds.")


def test_a_nested_call_is_part_of_its_callers_body() -> None:
    input = an_input()
    inner = replica_input.open_body(lambda: keep(lambda: input.limit(5)) or "inner")

    def outer() -> Any:
        return inner()

    def trace() -> Any:
        token = replica_input.current.set(input)
        try:
            return replica_input.open_body(outer)()
        finally:
            replica_input.current.reset(token)

    assert isinstance(keep(trace), SoftTimeLimitExceeded)


# -- at any moment of a thread --


def interrupt(input: replica_input.Input, how: str) -> None:
    input.limit(5) if how == "limit" else input.stop()


outcomes = pytest.mark.parametrize(
    ("how", "expected"), [("limit", SoftTimeLimitExceeded), ("stop", execution.Revoked)]
)


def test_a_profiler_works_after_a_body_that_ran_in_a_thread() -> None:
    """Python 3.11 hangs in it once an exception that was not raised was taken back."""
    program = """if True:
        import faulthandler, sys
        from gw_celery.replica import input

        faulthandler.dump_traceback_later(20, exit=True)
        input.Input(1, "proj.embed", "id-1", None).run_body(lambda: None, (), {})
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
    input = an_input()
    input._lock = Switching(moment, lambda: interrupt(input, how))  # type: ignore[assignment]

    def store() -> str:
        elsewhere(lambda: interrupt(input, how))
        return "stored"

    outcome = keep(lambda: input.run_body(lambda: "answer", (), {}))
    assert outcome == "answer" or isinstance(outcome, expected)
    assert keep(store) == "stored"
