"""How many replicas there should be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery.policy import scaling

RULES = scaling.Rules(start_up=3.0)
loads = st.floats(0, 1e4)


def decide(decider: scaling.Decider, now: float, need: float, actual: int) -> int:
    """Decide on a load that needs as much for its bursts, and is active while it needs any."""
    return decider.decide(now, need, actual, need, need > 0)


def decided(decider: scaling.Decider, needs: list[float], actual: int) -> list[int]:
    """The desired replicas each second, if replicas come and go at once."""
    sizes = []
    for now, need in enumerate(needs):
        actual = decide(decider, float(now), need, actual)
        sizes.append(actual)
    return sizes


def metered(rules: scaling.Rules, workloads: list[float]) -> scaling.Meter:
    meter = scaling.Meter(rules, 0.0)
    for now, workload in enumerate(workloads, start=1):
        meter.add(float(now), workload)
    return meter


@pytest.mark.parametrize(
    ("rate", "backlog", "fillable", "min_load", "need"),
    [
        pytest.param(18.0, 0.0, 9e9, 0.0, 10.0, id="a steady rate, with head-room"),
        pytest.param(18.0, 100.0, 9e9, 0.0, 9.0 + 5.0, id="a backlog gone within the target"),
        pytest.param(0.0, 72_000.0, 1.0, 0.0, 1.0, id="no more replicas than inputs fill"),
        pytest.param(0.0, 0.0, 9e9, 3.6, 2.0, id="a minimal load while nothing arrives"),
    ],
)
def test_the_need_of_a_service(
    rate: float, backlog: float, fillable: float, min_load: float, need: float
) -> None:
    rules = scaling.Rules(min_load=min_load)
    assert scaling.need(rate, backlog, 2.0, rules, fillable) == pytest.approx(need)


@given(loads, loads, loads, loads)
def test_more_load_never_needs_fewer_replicas(rate: float, backlog: float, a: float, b: float):
    least = scaling.need(rate, backlog, 2.0, RULES, 1e9)
    assert scaling.need(rate + a, backlog + b, 2.0, RULES, 1e9) >= least


def test_the_rate_is_taken_over_less_time_the_later_help_comes() -> None:
    spans = [scaling.Rules(start_up=start_up).rate_span for start_up in (0.0, 2.0, 10.0, 90.0)]
    assert spans == pytest.approx([35.0, 30.83333, 22.5, 12.5])


def test_the_rate_is_that_of_its_span() -> None:
    meter = metered(scaling.Rules(start_up=10.0), [5.0] * 30 + [9.0] * 30)
    assert meter.rate == pytest.approx(9.0)


def test_a_steady_load_asks_for_little_more_than_its_rate() -> None:
    meter = metered(scaling.Rules(start_up=60.0), [5.0] * 500)
    assert meter.pace == pytest.approx(5.0 * 160 / 170)


def test_a_burst_asks_for_what_serves_it_within_the_target() -> None:
    rules = scaling.Rules(start_up=0.0)
    meter = metered(rules, [0.0] * 495 + [100.0] * 5)
    # 500 of workload in 5 s, and the last of it may wait for 10 s.
    assert meter.pace == pytest.approx(500 / 15)


def test_a_burst_asks_for_more_where_help_comes_too_late() -> None:
    workloads = [1.0] * 495 + [100.0] * 5
    paces = [metered(scaling.Rules(start_up=s), workloads).pace for s in (0.0, 10.0, 90.0)]
    assert paces == sorted(paces)
    assert len(set(paces)) == 3


def test_an_input_that_was_counted_twice_is_corrected() -> None:
    meter = metered(RULES, [1.0] * 300 + [50.0, -50.0] + [1.0] * 298)
    assert meter.pace == pytest.approx(metered(RULES, [1.0] * 600).pace, rel=0.2)
    assert metered(RULES, [0.0] * 10 + [-50.0]).rate == 0.0


def test_the_meter_forgets_what_it_needs_no_more() -> None:
    meter = metered(RULES, [1.0] * 10_000)
    assert len(meter._samples) < 600


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0, 100)), min_size=1, max_size=60))
def test_the_largest_of_a_window_is_what_a_scan_finds(steps: list[tuple[float, float]]) -> None:
    largest, seen, now = scaling.Largest(), [], 0.0
    for gap, number in steps:
        now += gap
        seen.append((now, number))
        assert largest.add(now, number, 10.0) == max(n for at, n in seen if at >= now - 10.0)


@given(st.lists(loads), st.integers(0, 5), st.integers(0, 9), st.integers(0, 20))
def test_the_bounds_always_hold(needs: list[float], least: int, more: int, actual: int) -> None:
    decider = scaling.Decider(RULES, least, least + more)
    assert all(least <= size <= least + more for size in decided(decider, needs, actual))


@given(st.lists(loads, max_size=30), loads, loads, st.integers(0, 20))
def test_a_larger_need_never_decides_for_fewer(
    before: list[float], need: float, more: float, actual: int
) -> None:
    sizes = []
    for last in (need, need + more):
        decider = scaling.Decider(RULES, 0, 1_000)
        decided(decider, list(before), actual)
        sizes.append(decide(decider, float(len(before)), last, actual))
    assert sizes[0] <= sizes[1]


def test_it_grows_at_once() -> None:
    assert decide(scaling.Decider(RULES, 1, 60), 0.0, 7.3, 1) == 8


def test_what_is_starting_is_not_ordered_again() -> None:
    decider = scaling.Decider(RULES, 1, 60)
    assert [decide(decider, float(now), 7.3, 8) for now in range(5)] == [8] * 5


def test_an_excess_that_the_head_room_absorbs_starts_nothing() -> None:
    decider = scaling.Decider(RULES, 1, 60)
    assert decide(decider, 0.0, 10.9, 10) == 10
    assert decide(decider, 1.0, 11.1, 10) == 12


def test_it_shrinks_only_below_all_that_was_needed_in_the_window() -> None:
    rules = scaling.Rules(start_up=3.0, window=100.0)
    sizes = decided(scaling.Decider(rules, 1, 60), [5.0, 3.0] + [1.0] * 200, 1)
    assert sizes[100] == 5
    assert sizes[101] == 3
    assert sizes[102] == 1


def test_what_was_needed_once_is_held_for_a_residence_and_what_bursts_need_for_the_window() -> None:
    rules = scaling.Rules(start_up=3.0, window=100.0)
    decider = scaling.Decider(rules, 1, 60)
    actual, sizes = 1, []
    for now in range(103):
        burst = now == 0
        actual = decider.decide(
            float(now), 9.0 if burst else 0.1, actual, 4.0 if burst else 0.1, True
        )
        sizes.append(actual)
    assert rules.residence == 52.0
    assert sizes[52] == 9
    assert sizes[53] == 4
    assert sizes[100] == 4
    assert sizes[101] == 1


def test_a_burst_train_starts_no_more_replicas_than_there_may_be() -> None:
    decider, actual, starts = scaling.Decider(RULES, 1, 4), 1, 0
    for now in range(1_200):
        desired = decide(decider, float(now), 8.0 if now % 60 < 10 else 0.5, actual)
        starts += max(0, desired - actual)
        actual = desired
    assert starts <= 4


def test_the_minimum_holds_although_nothing_is_needed() -> None:
    assert decided(scaling.Decider(RULES, 2, 9), [0.0] * 2_000, 0)[-1] == 2


def test_a_changed_bound_holds_from_the_next_decision_on() -> None:
    decider = scaling.Decider(RULES, 1, 9)
    assert decide(decider, 0.0, 9.0, 1) == 9
    decider.update(1, 3)
    assert decide(decider, 1.0, 9.0, 9) == 3
    decider.update(5, 2)
    assert decide(decider, 2.0, 0.0, 3) == 5


def test_to_zero_it_goes_by_way_of_one() -> None:
    rules = scaling.Rules(start_up=3.0, inactivity_timeout=20.0)
    sizes = decided(scaling.Decider(rules, 0, 9), [5.0] + [0.0] * 25, 0)
    assert sizes[19] == 5
    assert sizes[20:22] == [1, 0]


def test_while_replicas_drain_the_last_one_stays() -> None:
    decider = scaling.Decider(scaling.Rules(inactivity_timeout=20.0), 0, 9)
    decide(decider, 0.0, 5.0, 0)
    assert [decide(decider, now, 0.0, 3) for now in (20.0, 21.0)] == [1, 1]


def test_without_a_timeout_the_last_replica_stays() -> None:
    sizes = decided(scaling.Decider(scaling.Rules(window=50.0), 0, 9), [4.0] + [0.0] * 900, 0)
    assert sizes[-1] == 1


def test_from_zero_the_first_input_starts_one() -> None:
    decider = scaling.Decider(scaling.Rules(inactivity_timeout=5.0), 0, 9)
    decided(decider, [1.0] + [0.0] * 20, 0)
    assert decide(decider, 21.0, 0.01, 0) == 1


def test_a_rate_that_is_only_remembered_is_no_activity() -> None:
    decider = scaling.Decider(scaling.Rules(inactivity_timeout=5.0), 0, 9)
    decider.decide(0.0, 1.0, 0, 1.0, is_active=True)
    sizes = [decider.decide(float(now), 0.5, 1, 0.5, is_active=False) for now in range(1, 7)]
    assert sizes == [1, 1, 1, 1, 0, 0]


def test_a_long_input_that_runs_keeps_its_replica() -> None:
    decider = scaling.Decider(scaling.Rules(inactivity_timeout=5.0, window=60.0), 0, 9)
    sizes = [decider.decide(float(now), 0.0, 1, 0.0, is_active=True) for now in range(900)]
    assert set(sizes) == {1}


def test_a_minimal_load_keeps_its_replicas_without_any_input() -> None:
    rules = scaling.Rules(min_load=3.6, inactivity_timeout=5.0)
    decider = scaling.Decider(rules, 0, 9)
    need = scaling.need(0.0, 0.0, 2.0, rules, 0.0)
    sizes = [decider.decide(float(now), need, 2, need, is_active=False) for now in range(900)]
    assert set(sizes) == {2}


def test_a_need_that_is_a_whole_number_but_for_rounding_starts_no_more() -> None:
    assert decide(scaling.Decider(RULES, 0, 9), 0.0, 3.0 + 1e-12, 0) == 3
    assert math.ceil(3.0 + 1e-12) == 4


def test_rules_change_and_what_was_needed_is_not_forgotten() -> None:
    decider = scaling.Decider(scaling.Rules(start_up=1.0, target_queue_time=1.0), 1, 9)
    assert decider.decide(0.0, 5.0, 1, 0.0, True) == 5
    decider.rules = scaling.Rules(start_up=100.0, target_queue_time=1.0)
    assert decider.decide(300.0, 0.0, 5, 0.0, False) == 5
    assert decider.decide(500.0, 0.0, 5, 0.0, False) == 1


def test_what_an_operator_asked_for_is_kept_for_a_while() -> None:
    decider = scaling.Decider(RULES, 1, 9)
    decider.hold(0.0, 4)
    assert decided(decider, [0.0] * 10, 4) == [4] * 10
    assert decided(decider, [0.0] * 1000, 4)[-1] == 1
