from __future__ import annotations

import pytest

from gw_celery import snapshot
from gw_celery.autoscale import startup


def at(state: str, seconds: float, pid: int | None = 7) -> list[snapshot.Replica]:
    return [snapshot.Replica(number=0, state=state, pid=pid, seconds_in_state=seconds)]


def test_a_start_up_lasts_from_the_start_of_a_child_until_it_is_ready() -> None:
    seen = startup.StartUp()
    seen.see(at("starting", 0.25), 100.25)
    seen.see(at("entering", 1.0), 102.0)
    seen.see(at("benchmarking", 1.0), 103.0)
    is_loading = [seen.is_loading]
    seen.see(at("ready", 0.5), 104.0)
    assert seen.seconds == pytest.approx(3.5)
    assert [*is_loading, seen.is_loading] == [True, False]
    seen.see(at("ready", 1.5), 105.0)
    assert seen.seconds == pytest.approx(3.5)


def test_the_newest_start_up_counts_most() -> None:
    seen = startup.StartUp()
    for pid, seconds in enumerate([2.0, 4.0, 8.0]):
        seen.see(at("starting", 0.0, pid), 0.0)
        seen.see(at("ready", 0.0, pid), seconds)
    assert seen.seconds == pytest.approx(5.5)


def test_a_child_that_never_was_ready_or_was_not_seen_loading_teaches_nothing() -> None:
    seen = startup.StartUp()
    seen.see(at("starting", 0.0), 0.0)
    seen.see(at("failed", 0.0, pid=None), 50.0)
    seen.see(at("ready", 9.0, pid=8), 60.0)
    assert seen.seconds is None
