from __future__ import annotations

import asyncio
import re
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from gw_celery.runtime import loop
from tests.processes import eventually

LIMIT = 0.2


@pytest.fixture
def host() -> Iterator[loop.Host]:
    host = loop.Host()
    host.start()
    yield host
    host.stop(5)


class Impatient(loop.Watchdog):
    limit = LIMIT


class Watched:
    """A loop with a watch on it, and what a body does there."""

    def __init__(self, host: loop.Host, silence: float, in_flight: int = 1) -> None:
        self.host = host
        self.watch = Impatient(
            host, lambda: [f"proj.embed[{number + 1}]" for number in range(in_flight)]
        )
        self.watch.silence = silence
        host.loop.call_soon_threadsafe(self.watch.start)
        assert host.answers(10)

    def run(self, seconds: float, name: str | None = "proj.embed[1]") -> None:
        """Block the loop in a task of this name, and wait for it."""

        async def start() -> None:
            await asyncio.create_task(block(seconds), name=name)

        asyncio.run_coroutine_threadsafe(start(), self.host.loop).result(20)


async def block(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if "event loop" in one.getMessage()]


def test_a_late_loop_is_told_once_with_the_task_and_the_line_that_keep_it(
    host: loop.Host, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(host, silence=0.0)
    watched.run(6 * LIMIT)
    (said,) = complaints(caplog)
    assert re.search(
        r"is \d\.\d s late, because of proj.embed\[1\], at \S+test_watchdog.py:\d+ in block", said
    )
    assert "asyncio.to_thread" in said
    watched.run(6 * LIMIT)
    assert len(complaints(caplog)) == 2
    watched.watch.stop()


def test_a_loop_that_is_often_late_is_told_of_once_in_a_while(
    host: loop.Host, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(host, silence=1000.0)
    for _ in range(3):
        watched.run(4 * LIMIT)
    assert len(complaints(caplog)) == 1
    watched.watch.stop()


@pytest.mark.parametrize(
    ("in_flight", "named"),
    [
        (0, "nothing"),
        (1, "proj.embed[1]"),
        (9, "proj.embed[1], proj.embed[2], proj.embed[3] and 6 more"),
    ],
)
def test_a_task_without_a_name_is_told_with_a_few_of_the_inputs_in_flight(
    host: loop.Host, caplog: pytest.LogCaptureFixture, in_flight: int, named: str
) -> None:
    watched = Watched(host, silence=0.0, in_flight=in_flight)
    watched.run(6 * LIMIT, name=None)
    assert f"(in flight: {named}), at " in complaints(caplog)[0]
    watched.watch.stop()


def test_a_delay_that_no_thread_could_see_is_told_when_the_loop_runs_again(
    host: loop.Host, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(host, silence=0.0)
    watched.watch.stop()  # as where the GIL is held: the thread sees nothing
    watched.run(6 * LIMIT)
    eventually(lambda: complaints(caplog), 10)
    assert "a call held the GIL; in flight: proj.embed[1]" in complaints(caplog)[0]


def test_a_second_is_how_late_a_loop_may_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(loop, "time", clock)
    timers: list[float] = []
    turning = types.SimpleNamespace(call_later=lambda seconds, turn: timers.append(seconds))
    host: Any = types.SimpleNamespace(loop=turning)
    watch = loop.Watchdog(host, list)
    watch._turn()
    for late in (0.95, 1.1):
        assert complaints(caplog) == []
        clock.now += timers[-1] + late
        watch._turn()
    (said,) = complaints(caplog)
    assert "is 1.1 s late" in said
