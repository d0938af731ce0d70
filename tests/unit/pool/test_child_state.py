from __future__ import annotations

import math

import pytest

from gw_celery import conf
from gw_celery.pool import replica as child_state
from gw_celery.pool.replica import State

DEADLINES = conf.Settings(
    boot_timeout=30,
    start_timeout=600,
    benchmark_timeout=120,
    drain_timeout=30,
    heartbeat_timeout=15,
)


def started(now: float = 100.0) -> child_state.ChildState:
    return child_state.ChildState(DEADLINES, now)


def entering(now: float = 100.0) -> child_state.ChildState:
    life = started(now)
    life.loaded(now)
    return life


def probing(now: float = 100.0) -> child_state.ChildState:
    life = entering(now)
    life.entered(now)
    return life


def benchmarking(now: float = 100.0) -> child_state.ChildState:
    life = probing(now)
    life.probed(now)
    return life


def ready(now: float = 100.0) -> child_state.ChildState:
    life = benchmarking(now)
    life.measured(now)
    return life


def test_a_child_proves_each_step_of_its_start() -> None:
    life = started(now=100)
    assert (life.current, life.since) == (State.STARTING, 100)
    life.loaded(102)
    assert (life.current, life.since) == (State.ENTERING, 102)
    assert not life.is_ready
    life.entered(150)
    assert (life.current, life.since) == (State.PROBING, 150)
    life.probed(151)
    assert (life.current, life.since) == (State.BENCHMARKING, 151)
    assert not life.is_ready
    life.measured(160)
    assert (life.current, life.since) == (State.READY, 160)
    assert life.is_ready


def test_a_step_out_of_order_changes_nothing() -> None:
    life = started()
    life.entered(101)
    life.probed(101)
    life.measured(101)
    assert (life.current, life.since) == (State.STARTING, 100)
    life = ready()
    life.loaded(105)
    life.entered(105)
    life.probed(105)
    life.measured(105)
    assert (life.current, life.since) == (State.READY, 100)


def test_a_drained_child_is_never_ready_again() -> None:
    life = entering()
    life.drain(101)
    life.loaded(102)
    life.entered(103)
    assert life.current is State.DRAINING
    assert not life.is_ready


@pytest.mark.parametrize(
    ("life", "step", "bound", "setting"),
    [
        (started(), "starting", 30, "gw_boot_timeout"),
        (entering(), "entering", 600, "gw_start_timeout"),
    ],
)
def test_a_step_that_takes_too_long_is_named_with_its_setting(
    life: child_state.ChildState, step: str, bound: float, setting: str
) -> None:
    assert life.overdue(100 + bound - 0.001) is None
    reason = life.overdue(100 + bound)
    assert reason is not None
    assert f"was {step} for {bound} s" in reason
    assert setting in reason


def test_the_deadline_of_a_step_counts_from_the_step_before_it() -> None:
    life = started(now=1000)
    life.loaded(1029)
    assert life.overdue(1029 + 599) is None
    assert life.overdue(1029 + 600) is not None


def test_a_child_that_loads_owes_no_heartbeat() -> None:
    assert entering().overdue(100 + 599) is None


def test_a_ready_child_without_heartbeats_is_overdue() -> None:
    life = ready(now=50)
    assert life.overdue(64.9) is None
    reason = life.overdue(65)
    assert reason is not None
    assert "no heartbeat for 15 s" in reason
    assert "gw_heartbeat_timeout" in reason


def test_a_heartbeat_gives_a_child_its_full_time_again() -> None:
    life = ready()
    for now in range(110, 1000, 10):
        life.beat(now)
        assert life.overdue(now + 14.9) is None
    assert life.overdue(990 + 15) is not None


def test_a_draining_child_still_owes_its_heartbeat() -> None:
    life = ready()
    life.drain(101)
    assert life.overdue(114.9) is None
    assert "no heartbeat" in (life.overdue(115) or "")


@pytest.mark.parametrize(("limit", "bound"), [(0, 30), (29, 30), (300, 300), (-5, 30)])
def test_a_drain_lasts_until_its_timeout_or_the_last_limit(limit: int, bound: int) -> None:
    life = ready(now=100)
    life.drain(200)
    for now in range(200, 200 + bound):
        life.beat(now)
        assert life.overdue(now, max(0, 200 + limit - now)) is None
    assert "gw_drain_timeout" in (life.overdue(200 + bound, 0) or "")


def test_a_drain_without_a_limit_has_no_deadline_and_lingers_until_it_is_bound_again() -> None:
    life = ready(now=100)
    life.drain(200)
    for now in range(200, 300):
        life.beat(now)
        assert life.overdue(now, math.inf) is None
        assert life.lingers is (now >= 230)
    life.beat(328)
    assert life.overdue(328, 0) is None
    assert "gw_drain_timeout" in (life.overdue(329, 0) or "")
    bounded = ready(now=100)
    assert not bounded.lingers
    bounded.drain(200)
    bounded.beat(600)
    assert bounded.overdue(600, 500) is None
    assert not bounded.lingers


def test_a_second_drain_does_not_move_the_deadline() -> None:
    life = ready()
    life.drain(110)
    life.drain(135)
    life.beat(139)
    assert life.overdue(140) is not None


def test_a_start_up_is_that_of_the_process_however_often_it_is_measured() -> None:
    life = started(now=100)
    life.loaded(110)
    life.entered(150)
    life.probed(151)
    assert life.start_up is None
    life.measured(160)
    life.measure_again(500)
    life.measured(503)
    assert life.start_up == 60


def test_how_long_a_child_served_counts_from_its_ready() -> None:
    assert started().seconds_since_ready(1100) < 0
    assert entering().seconds_since_ready(1100) < 0
    life = ready(now=10)
    assert life.seconds_since_ready(11) == 1
    life.drain(20)
    assert life.seconds_since_ready(21) == 11


def test_the_wait_before_the_next_child_doubles_up_to_a_minute() -> None:
    replica = child_state.Replica(0)
    assert replica.retry_at == 0
    assert [replica.start_failed(100) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert replica.retry_at == 164
    for _ in range(2000):
        assert replica.start_failed(0) == 64


def test_a_child_without_a_service_that_wants_inputs_is_unready_until_one_does() -> None:
    life = ready()
    life.wants_inputs(103, False)
    assert (life.current, life.since, life.is_ready, life.is_up) == (
        State.UNREADY,
        103,
        False,
        True,
    )
    life.wants_inputs(104, False)
    assert life.since == 103
    life.wants_inputs(105, True)
    assert (life.current, life.since, life.is_up) == (State.READY, 105, True)


def test_only_a_loaded_child_can_be_unready() -> None:
    for life in (benchmarking(), entering()):
        life.wants_inputs(101, False)
        assert life.current is not State.UNREADY
    life = ready()
    life.drain(101)
    life.wants_inputs(102, True)
    assert life.current is State.DRAINING


def test_silence_counts_from_the_end_of_loading_on() -> None:
    life = entering()
    life.beat(100)
    assert life.overdue(500) is None
    assert "no heartbeat for 15 s" in (probing().overdue(115) or "")


def test_a_benchmark_has_a_bound_however_alive_its_child_is() -> None:
    life = benchmarking()
    life.beat(219)
    assert life.overdue(219.9) is None
    reason = life.overdue(220) or ""
    assert "was benchmarking for 120 s (setting gw_benchmark_timeout)" in reason


def test_a_ready_child_may_be_measured_again() -> None:
    life = ready(100)
    life.beat(200)
    life.measure_again(200)
    assert (life.current, life.is_ready, life.is_up) == (State.BENCHMARKING, False, False)
    assert life.overdue(200 + 14) is None
    assert life.overdue(200 + 15) is not None, "it owes its heartbeats meanwhile"
    life.measured(230)
    assert life.is_ready


def test_only_a_ready_child_may_be_measured_again() -> None:
    life = probing(100)
    life.measure_again(101)
    assert life.current is State.PROBING
    life = ready(100)
    life.drain(101)
    life.measure_again(102)
    assert life.current is State.DRAINING
