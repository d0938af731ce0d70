from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery.pool.request_table import Limit, Limits, State


@dataclasses.dataclass(eq=False)
class Request:
    number: int
    soft_limit: float | None = None
    hard_limit: float | None = None
    state: State = State.RUNNING
    hard_limit_at: float = 0.0


def begun(*requests: Request, now: float = 0.0) -> Limits:
    watch = Limits()
    for request in requests:
        watch.begin(request, now)
    return watch


def test_limits_count_from_the_start_of_the_input() -> None:
    request = Request(1, soft_limit=10, hard_limit=20)
    watch = begun(request, now=100)
    assert list(watch.due(109.9)) == []
    assert list(watch.due(110)) == [(request, Limit.SOFT)]
    assert list(watch.due(119.9)) == []
    assert list(watch.due(120)) == [(request, Limit.HARD)]
    assert list(watch.due(1000)) == []


def test_a_late_look_finds_the_soft_limit_before_the_hard_one() -> None:
    request = Request(1, soft_limit=10, hard_limit=10)
    assert list(begun(request).due(50)) == [(request, Limit.SOFT), (request, Limit.HARD)]


def test_limits_of_many_inputs_come_in_the_order_of_their_time() -> None:
    watch = begun(*(Request(number, hard_limit=limit) for number, limit in enumerate([30, 10, 20])))
    assert [request.number for request, _ in watch.due(100)] == [1, 2, 0]


def test_an_input_that_ends_while_limits_are_handled_reaches_none_of_them() -> None:
    first, second = Request(1, hard_limit=10), Request(2, hard_limit=10)
    due = begun(first, second).due(10)
    assert next(due) == (first, Limit.HARD)
    second.state = State.ENDED
    assert list(due) == []


@pytest.mark.parametrize("nothing", [None, 0, 0.0])
def test_an_input_without_limits_may_run_for_ever(nothing: float | None) -> None:
    request = Request(1, soft_limit=nothing, hard_limit=nothing)
    watch = begun(request)
    assert (watch.next_at(), request.hard_limit_at) == (math.inf, math.inf)
    assert list(watch.due(1e9)) == []


def test_an_input_that_was_stopped_reaches_only_its_grace_unless_it_goes_in_time() -> None:
    request = Request(1, soft_limit=3, hard_limit=4)
    watch = begun(request)
    request.state = State.STOPPING
    watch.add(6, request, Limit.GRACE)
    assert watch.next_at() == 6
    assert list(watch.due(5.9)) == []
    assert list(watch.due(6)) == [(request, Limit.GRACE)]
    watch.add(8, request, Limit.GRACE)
    request.state = State.ENDED
    assert list(watch.due(1000)) == []


def test_the_next_limit_is_the_earliest_of_what_runs() -> None:
    first, second = Request(1, hard_limit=10), Request(2, hard_limit=30)
    watch = begun(first, second)
    assert watch.next_at() == 10
    first.state = State.ENDED
    assert watch.next_at() == 30
    second.state = State.ENDED
    assert watch.next_at() == math.inf


def test_a_worker_that_ends_has_no_limits_any_more() -> None:
    watch = begun(Request(1, soft_limit=1, hard_limit=2))
    watch.clear()
    assert watch.next_at() == math.inf
    assert list(watch.due(100)) == []


def test_many_inputs_that_end_early_leave_the_limits_of_the_others() -> None:
    stays = Request(0, soft_limit=50, hard_limit=90)
    watch = begun(stays)
    for number in range(1, 20_000):
        request = Request(number, soft_limit=300, hard_limit=600)
        watch.begin(request, now=0)
        request.state = State.ENDED
    assert list(watch.due(1000)) == [(stays, Limit.SOFT), (stays, Limit.HARD)]


times = st.none() | st.integers(1, 50)


@given(
    st.lists(st.tuples(st.integers(0, 30), times, times, st.none() | st.integers(0, 60))),
    st.lists(st.integers(0, 100), min_size=1).map(sorted),
)
def test_every_limit_is_reached_once_at_its_time_unless_the_input_ended(
    inputs: list[tuple[int, int | None, int | None, int | None]], looks: list[int]
) -> None:
    """Inputs of (start, soft, hard, end); limits are looked at now and then."""
    watch, reached = Limits(), []
    requests = {
        Request(n, soft, hard): (start, end) for n, (start, soft, hard, end) in enumerate(inputs)
    }
    for now in range(looks[-1] + 1):
        for request, (start, end) in requests.items():
            if start == now:
                watch.begin(request, now)
            if end == now and end >= start:
                request.state = State.ENDED
        if now in looks:
            reached += [(request.number, what) for request, what in watch.due(now)]
    expected = []
    for request, (start, end) in requests.items():
        gone = end if end is not None and end >= start else 1000
        for limit, what in ((request.soft_limit, Limit.SOFT), (request.hard_limit, Limit.HARD)):
            seen = [look for look in looks if limit and look >= start + limit]
            if seen and seen[0] < gone:
                expected.append((request.number, what))
    assert sorted(reached, key=repr) == sorted(expected, key=repr)
