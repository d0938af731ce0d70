"""The sums of the services of a worker."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery.pool.request_table import Counters, Result, Stage
from gw_celery.protocol import snapshot

SERVED = [Result.VALUE, Result.NO_VALUE, Result.REFUSED]


def counters_of(*workloads: float) -> Counters:
    counters = Counters()
    for workload in workloads:
        counters.arrive(workload)
    return counters


def test_the_newest_inputs_count_most_in_the_mean() -> None:
    counters, others = counters_of(10.0), counters_of(2.0)
    assert (counters.as_snapshot().mean, others.as_snapshot().mean) == (10.0, 2.0)
    for _ in range(97):
        counters.arrive(20.0)
    assert 19.0 < counters.as_snapshot().mean < 20.0
    assert snapshot.mean_workload([counters.as_snapshot(), others.as_snapshot()]) > 19.0
    assert snapshot.mean_workload([]) == 1.0


def test_the_seconds_of_a_slot_are_those_of_what_was_served() -> None:
    counters = counters_of(1.0, 1.0)
    for _ in range(2):
        counters.move(1.0, Stage.WAITING, Stage.RUNNING)
    counters.settle(1.0, Stage.RUNNING, Result.VALUE, busy=2.5)
    counters.settle(1.0, Stage.RUNNING, Result.GIVEN_BACK, busy=9.0)
    assert counters.as_snapshot().busy == 2.5


def test_what_gave_no_value_is_served_and_failed_and_what_is_refused_counts_apart() -> None:
    counters = counters_of(2.0, 2.0, 2.0)
    for result in SERVED:
        counters.settle(2.0, Stage.WAITING, result)
    seen = counters.as_snapshot()
    assert (seen.served, seen.failed, seen.refused, seen.refused_inputs) == (6.0, 4.0, 2.0, 1)


def test_rounding_leaves_nothing_behind() -> None:
    workloads = [0.1 * (number % 7) for number in range(1000)]
    counters = counters_of(*workloads)
    for workload in workloads:
        counters.move(workload, Stage.WAITING, Stage.RUNNING)
    assert counters.as_snapshot().waiting == 0.0


EVENTS = st.lists(
    st.tuples(st.sampled_from(["start", "wait", *Result]), st.integers(0, 20)), max_size=200
)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20), EVENTS)
def test_whatever_happens_the_sums_are_conserved(
    workloads: list[float], events: list[tuple[str | Result, int]]
) -> None:
    counters = counters_of(*workloads)
    stages = dict.fromkeys(range(len(workloads)), Stage.WAITING)
    for what, number in events:
        if number not in stages:
            continue
        if isinstance(what, Result):
            counters.settle(workloads[number], stages.pop(number), what)
        else:
            stage = Stage.RUNNING if what == "start" else Stage.WAITING
            counters.move(workloads[number], stages[number], stage)
            stages[number] = stage
    one = counters.as_snapshot()
    total = one.waiting + one.running + one.served + one.given_back
    assert total == pytest.approx(one.arrived, rel=1e-9, abs=1e-2)
    counted = one.waiting_inputs + one.running_inputs + one.served_inputs
    assert counted + one.given_back_inputs == one.arrived_inputs
    assert min(dataclasses.astuple(one)) >= 0
    assert one.waiting_inputs + one.running_inputs == len(stages)
