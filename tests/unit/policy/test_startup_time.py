from __future__ import annotations

import pytest

from gw_celery.policy import startup_time
from gw_celery.protocol import snapshot


def at(state: str, start_up: float | None = None, pid: int | None = 7) -> snapshot.Replica:
    return snapshot.Replica(number=0, state=state, pid=pid, start_up=start_up)


def test_a_start_up_lasts_from_the_start_of_a_child_until_it_is_ready() -> None:
    seen = startup_time.StartUp()
    is_loading = []
    for one in (at("starting"), at("entering"), at("benchmarking"), at("ready", 3.5)):
        seen.see([one])
        is_loading.append(seen.is_loading)
    assert is_loading == [True, True, True, False]
    assert seen.seconds == 3.5


def test_one_that_was_ready_at_the_next_look_teaches_as_well() -> None:
    seen = startup_time.StartUp()
    seen.see([])
    seen.see([at("ready", 0.4)])
    assert seen.seconds == 0.4


def test_a_replica_that_is_measured_again_does_not_start() -> None:
    seen = startup_time.StartUp()
    for state in ("ready", "benchmarking", "ready", "unready", "draining"):
        seen.see([at(state, 60.0)])
        assert not seen.is_loading
    assert seen.seconds == 60.0
    seen.see([at("ready", 60.0), at("starting", pid=8)])
    assert seen.is_loading
    seen.see([at("ready", 60.0), at("ready", 50.0, pid=8)])
    assert seen.seconds == 55.0


def test_the_newest_start_up_counts_most() -> None:
    seen = startup_time.StartUp()
    for pid, seconds in enumerate([2.0, 4.0, 8.0]):
        seen.see([at("ready", seconds, pid)])
    assert seen.seconds == pytest.approx(5.5)


def test_a_child_that_never_was_ready_teaches_nothing() -> None:
    seen = startup_time.StartUp()
    seen.see([at("starting")])
    seen.see([at("failed", pid=None)])
    assert (seen.seconds, seen.is_loading) == (None, False)
