"""The simulator's queue, under policies that no option asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scaling_plot
from gw_celery.policy import scaling
from gw_celery.simulate import cluster, runs, trace
from tests import simulator


class Course:
    """A policy that is told in advance what to want, second by second."""

    on_arrival = False

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes

    def desired(self, now: float, observation: cluster.Observation) -> int:
        return self._sizes[min(int(now), len(self._sizes) - 1)]


def played(
    arrivals: Sequence[tuple[float, float]], scaler: cluster.Scaler, **given: Any
) -> cluster.Outcome:
    replayed = trace.Trace([at for at, _ in arrivals], [work for _, work in arrivals])
    asked = scenario(**{"start_up": 3.0, "most": 9} | given)
    return cluster.simulate(replayed, asked, [scaler], [0.0])


def poisson(seed: int, rate: float, count: int) -> trace.Trace:
    times = [at for at, _ in simulator.poisson(seed, rate, count)]
    return trace.Trace([at - times[0] for at in times], [1.0] * count)


def scenario(**given: Any) -> cluster.Scenario:
    rules = scaling.Rules(start_up=given.pop("start_up", 5.0))
    return cluster.Scenario(**({"score": 1.0, "rules": rules, "most": 20} | given))


def test_a_replica_costs_from_its_start_and_serves_after_it() -> None:
    found = played([(0, 10), (0, 10)], Course(2))
    assert found.waits == [0, 3]
    assert found.starts == 1
    assert found.replica_seconds == 13 + 13


def test_a_busy_replica_ends_its_input_before_it_goes() -> None:
    found = played([(0, 10), (0, 4), (9, 0)], Course(2, 2, 1), least=2)
    assert found.waits == [0, 0, 1]
    assert found.replica_seconds == 10 + 4


def test_an_idle_replica_that_has_gone_serves_no_more() -> None:
    found = played([(0, 0), (5, 4), (5, 4)], Course(2, 1), least=2)
    assert found.waits == [0, 0, 4]
    assert found.replica_seconds == 13 + 1


def test_a_replica_that_is_not_wanted_any_more_stops_starting() -> None:
    found = played([(0, 10), (0, 1)], Course(2, 1))
    assert found.waits == [0, 10]
    assert found.replica_seconds == 11 + 1


def test_a_draining_replica_takes_up_its_place() -> None:
    found = played([(0, 5), (0, 5)], Course(2, 1, 2), least=2, most=2)
    assert found.starts == 0
    assert found.replica_seconds == 10


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 60), st.floats(0, 20)), min_size=1, max_size=40),
    st.lists(st.integers(1, 9), min_size=1, max_size=80),
)
def test_no_input_is_lost_whatever_the_policy_wants(
    arrivals: list[tuple[float, float]], sizes: list[int]
) -> None:
    found = played(sorted(arrivals), Course(*sizes))
    assert all(wait is not None and wait >= 0 for wait in found.waits)
    assert found.replica_seconds >= sum(work for _, work in arrivals) - 1e-6


def test_nodes_share_the_maximum_and_serve_as_one_pool() -> None:
    one = poisson(4, 6.0, 3_000)
    single = runs.play(one, scenario(most=12))
    several, moments = scaling_plot.record(one, scenario(nodes=5, most=12))
    assert max(moment.actual for moment in moments) <= 12
    assert several.replica_seconds == pytest.approx(single.replica_seconds, rel=0.15)
    assert None not in several.waits


def test_our_policy_sees_no_workload_of_what_still_waits() -> None:
    first = poisson(5, 3.0, 200)
    later = trace.Trace([*first.times, first.seconds + 1], [*first.workloads, 1e3])
    sizes = [
        [moment.actual for moment in scaling_plot.record(each, scenario())[1]]
        for each in (first, later)
    ]
    seconds = int(first.seconds)
    assert sizes[0][:seconds] == sizes[1][:seconds]
