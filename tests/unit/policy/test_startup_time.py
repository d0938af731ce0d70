from __future__ import annotations

import pytest

from gw_celery.policy import startup_time
from gw_celery.protocol import snapshot


def replica(state: str, start_up: float | None = None, pid: int | None = 7) -> snapshot.Replica:
    return snapshot.Replica(number=0, state=state, pid=pid, start_up=start_up)


@pytest.mark.parametrize(
    ("looks", "seconds"),
    [
        pytest.param([[], [replica("ready", 0.4)]], 0.4, id="READY at the next look"),
        pytest.param([[replica("starting")], [replica("failed", pid=None)]], None, id="failed"),
        pytest.param([[replica("ready", 9.0)]] * 3, 9.0, id="each child counts once"),
        pytest.param(
            [[replica("ready", seconds, pid)] for pid, seconds in enumerate([2.0, 4.0, 8.0])],
            5.5,
            id="the newest counts most",
        ),
        pytest.param(
            [[replica("ready", 60.0)], [replica("ready", 60.0), replica("ready", 50.0, pid=8)]],
            55.0,
            id="a child beside another",
        ),
    ],
)
def test_the_duration_of_a_start_up(
    looks: list[list[snapshot.Replica]], seconds: float | None
) -> None:
    start_up = startup_time.StartUp()
    for replicas in looks:
        start_up.observe(replicas)
    assert start_up.seconds == seconds


@pytest.mark.parametrize(
    ("replicas", "is_loading"),
    [
        ([replica("starting")], True),
        ([replica("entering")], True),
        ([replica("probing")], True),
        ([replica("benchmarking")], True),
        ([replica("ready", 60.0)], False),
        # It is measured again.
        ([replica("benchmarking", 60.0)], False),
        ([replica("unready", 60.0)], False),
        ([replica("draining", 60.0)], False),
        ([replica("ready", 60.0), replica("starting", pid=8)], True),
        ([replica("failed", pid=None)], False),
        ([], False),
    ],
)
def test_a_child_that_was_not_ready_yet_is_loading(
    replicas: list[snapshot.Replica], is_loading: bool
) -> None:
    start_up = startup_time.StartUp()
    start_up.observe([replica("starting")])
    start_up.observe(replicas)
    assert start_up.is_loading is is_loading
