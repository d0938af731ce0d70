from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError

from gw_celery import errors
from gw_celery.pool import lane
from gw_celery.testing import eventually


class Loop:
    """The worker's loop: what Celery is told, and in which thread."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.told: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()
        self.lane = lane.Lane(self.woken.set)

    def submit(self, target: Any, body: Any = b"!") -> Any:
        args = ("gw_celery.probe_sweep", "id", {"task": "it"}, body, "application/json", "utf-8")
        named = ("accept_callback", "callback", "error_callback")
        return self.lane.submit(target, args, {name: self._noting(name) for name in named})

    def _noting(self, name: str) -> Any:
        def note(*args: Any) -> None:
            self.threads.add(threading.get_ident())
            self.told.append((name, *args))

        return note

    def turn(self) -> None:
        assert self.woken.wait(10)
        self.woken.clear()
        self.lane.settle()

    def names(self) -> list[str]:
        return [one[0] for one in self.told]


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.lane.close()


def succeed(*args: Any) -> Any:
    return 0, None, 0.25


def test_a_sweep_runs_in_a_thread_and_celery_is_told_in_the_loops(loop: Loop) -> None:
    seen: list[int] = []

    def target(*args: Any) -> Any:
        seen.append(threading.get_ident())
        return 0, None, 0.25

    loop.submit(target)
    assert loop.names() == ["accept_callback"], "it is acknowledged as it begins"
    loop.turn()
    assert loop.told[1:] == [("callback", (0, "None", 0.25))]
    assert loop.threads == {threading.get_ident()}
    assert seen != [threading.get_ident()]


def test_nothing_of_the_body_is_decoded(loop: Loop) -> None:
    seen: list[Any] = []
    loop.submit(lambda *args: seen.append(args) or (0, None, 0.0), body=b"\x80a pickle")
    loop.turn()
    assert seen == [("gw_celery.probe_sweep", "id", {"task": "it"}, ([], {}, None), None, None)]


def test_a_failure_is_celerys_to_tell(loop: Loop) -> None:
    try:
        raise OSError("the broker is away")
    except OSError:
        info = ExceptionInfo()
    loop.submit(lambda *args: (1, info, 0.5))
    loop.turn()
    assert loop.told[1:] == [("callback", (1, info, 0.5))]


def test_what_the_tracer_lets_out_ends_neither_thread_nor_worker(loop: Loop) -> None:
    def exits(*args: Any) -> Any:
        raise SystemExit(3)

    loop.submit(exits)
    loop.turn()
    ((name, einfo),) = loop.told[1:]
    assert (name, type(einfo.exception.exc)) == ("error_callback", WorkerLostError)
    loop.submit(succeed)
    loop.turn()
    assert loop.names()[-1] == "callback"


def test_sweeps_beyond_those_that_may_wait_are_dropped_and_say_so(loop: Loop) -> None:
    begun, go = threading.Event(), threading.Event()

    def blocks(*args: Any) -> Any:
        begun.set()
        assert go.wait(10)
        return 0, None, 0.0

    loop.submit(blocks)
    assert begun.wait(10)
    for _ in range(4):
        loop.submit(succeed)
    loop.submit(succeed)
    dropped = loop.told[-1][1].exception.exc
    assert isinstance(dropped, errors.SweepDropped)
    assert "gw_celery.probe_sweep was dropped: 4 sweeps wait" in str(dropped)
    go.set()
    eventually(lambda: (loop.lane.settle(), loop.names().count("callback") == 5)[1])


def test_the_thread_ends_with_the_worker_and_is_not_there_before_it_is_needed() -> None:
    made = Loop()
    made.lane.close()
    assert "gw-sweeps" not in {one.name for one in threading.enumerate()}
    made.submit(succeed)
    made.turn()
    made.lane.close()
    assert "gw-sweeps" not in {one.name for one in threading.enumerate()}
