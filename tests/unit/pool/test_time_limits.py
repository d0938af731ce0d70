from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery.pool import time_limits
from gw_celery.pool.time_limits import Limit


@dataclasses.dataclass(frozen=True)
class Request:
    number: int
    soft_limit: float | None = None
    hard_limit: float | None = None


def test_limits_count_from_the_start_of_the_input() -> None:
    watch, request = time_limits.Limits(), Request(1, soft_limit=10, hard_limit=20)
    watch.begin(request, now=100)
    assert list(watch.due(109.9)) == []
    assert list(watch.due(110)) == [(request, Limit.SOFT)]
    assert list(watch.due(119.9)) == []
    assert list(watch.due(120)) == [(request, Limit.HARD)]
    assert list(watch.due(1000)) == []


def test_a_late_look_finds_the_soft_limit_before_the_hard_one() -> None:
    watch, request = time_limits.Limits(), Request(1, soft_limit=10, hard_limit=10)
    watch.begin(request, now=0)
    assert list(watch.due(50)) == [(request, Limit.SOFT), (request, Limit.HARD)]


def test_limits_of_many_inputs_come_in_the_order_of_their_time() -> None:
    watch = time_limits.Limits()
    requests = [Request(number, hard_limit=limit) for number, limit in enumerate([30, 10, 20])]
    for request in requests:
        watch.begin(request, now=0)
    assert [request.number for request, _ in watch.due(100)] == [1, 2, 0]


def test_an_input_that_ended_reaches_no_limit() -> None:
    watch, request = time_limits.Limits(), Request(1, soft_limit=10, hard_limit=20)
    watch.begin(request, now=0)
    watch.forget(request)
    watch.forget(request)
    assert list(watch.due(1000)) == []


def test_an_input_that_ends_while_limits_are_handled_reaches_none_of_them() -> None:
    watch = time_limits.Limits()
    first, second = Request(1, hard_limit=10), Request(2, hard_limit=10)
    watch.begin(first, now=0)
    watch.begin(second, now=0)
    due = watch.due(10)
    assert next(due) == (first, Limit.HARD)
    watch.forget(second)
    assert list(due) == []


@pytest.mark.parametrize("nothing", [None, 0, 0.0])
def test_an_input_without_limits_may_run_for_ever(nothing: float | None) -> None:
    watch = time_limits.Limits()
    watch.begin(Request(1, soft_limit=nothing, hard_limit=nothing), now=0)
    assert watch.next_in(0) is None
    assert list(watch.due(1e9)) == []


def test_a_stopped_input_has_until_its_grace_to_go() -> None:
    watch, request = time_limits.Limits(), Request(1, hard_limit=20)
    watch.begin(request, now=0)
    assert list(watch.due(20)) == [(request, Limit.HARD)]
    watch.expect_gone(request, when=25)
    assert watch.next_in(20) == 5
    assert list(watch.due(24.9)) == []
    assert list(watch.due(25)) == [(request, Limit.GRACE)]
    assert list(watch.due(1000)) == []


def test_a_stopped_input_that_goes_in_time_is_not_missed() -> None:
    watch, request = time_limits.Limits(), Request(1)
    watch.expect_gone(request, when=5)
    watch.forget(request)
    assert list(watch.due(100)) == []


def test_an_input_that_was_stopped_before_its_limits_reaches_only_its_grace() -> None:
    watch, request = time_limits.Limits(), Request(1, soft_limit=3, hard_limit=4)
    watch.begin(request, now=0)
    watch.expect_gone(request, when=6)
    assert list(watch.due(1000)) == [(request, Limit.GRACE)]


def test_the_next_limit_is_the_earliest_of_what_runs() -> None:
    watch = time_limits.Limits()
    assert watch.next_in(0) is None
    first, second = Request(1, hard_limit=10), Request(2, hard_limit=30)
    watch.begin(first, now=0)
    watch.begin(second, now=0)
    assert watch.next_in(4) == 6
    watch.forget(first)
    assert watch.next_in(4) == 26
    watch.forget(second)
    assert watch.next_in(4) is None


def test_a_limit_that_has_passed_is_due_at_once() -> None:
    watch = time_limits.Limits()
    watch.begin(Request(1, hard_limit=10), now=0)
    assert watch.next_in(99) == 0


def test_a_drain_waits_for_the_longest_hard_limit_that_is_left() -> None:
    watch = time_limits.Limits()
    requests = [Request(1, hard_limit=10), Request(2, hard_limit=300)]
    assert watch.longest_left(requests, now=50) == 0, "none has begun"
    for request in requests:
        watch.begin(request, now=0)
    assert watch.longest_left(requests, now=100) == 200
    assert watch.longest_left(requests[:1], now=5) == 5
    assert watch.longest_left([], now=100) == 0
    watch.expect_gone(requests[1], when=7)
    assert watch.longest_left(requests, now=5) == 5, "what was stopped has its grace"


def test_a_drain_waits_for_as_long_as_it_takes_where_an_input_has_no_limit() -> None:
    watch, request = time_limits.Limits(), Request(3, soft_limit=900)
    assert watch.longest_left([Request(1, hard_limit=10), request], now=0) == 0, "none has begun"
    watch.begin(request, now=0)
    assert watch.longest_left([Request(1, hard_limit=10), request], now=5) == math.inf
    watch.expect_gone(request, when=10)
    assert watch.longest_left([request], now=5) == 0


def test_a_worker_that_ends_has_no_limits_any_more() -> None:
    watch = time_limits.Limits()
    requests = [Request(1, soft_limit=1, hard_limit=2), Request(2)]
    watch.begin(requests[0], now=0)
    watch.expect_gone(requests[1], when=3)
    watch.clear()
    assert watch.next_in(0) is None
    assert list(watch.due(100)) == []
    assert watch.longest_left(requests, now=0) == 0


def test_many_inputs_that_end_early_leave_the_limits_of_the_others() -> None:
    watch, stays = time_limits.Limits(), Request(0, soft_limit=50, hard_limit=90)
    watch.begin(stays, now=0)
    for number in range(1, 20_000):
        request = Request(number, soft_limit=300, hard_limit=600)
        watch.begin(request, now=0)
        watch.forget(request)
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
    watch, reached = time_limits.Limits(), []
    requests = {
        Request(n, soft, hard): (start, end) for n, (start, soft, hard, end) in enumerate(inputs)
    }
    for now in range(looks[-1] + 1):
        for request, (start, end) in requests.items():
            if start == now:
                watch.begin(request, now)
            if end == now:
                watch.forget(request)
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
