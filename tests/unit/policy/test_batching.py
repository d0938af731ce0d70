from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery.policy import batch_buffer, batching
from gw_celery.policy.batching import Flush


@dataclasses.dataclass(eq=False, kw_only=True)
class Item(batch_buffer.Waiting):
    payload: object


BOUNDS = batch_buffer.Bounds(size=4, wait=0.01)


def filled(*arrivals: tuple[str, float], **given: object) -> batch_buffer.Buffers[Item]:
    buffers: batch_buffer.Buffers[Item] = batch_buffer.Buffers()
    for key, since in arrivals:
        buffers.put(Item(payload=(key, since), key=key, since=since, **given))
    return buffers


def members(batch: batching.Batch[Item] | None) -> list[object]:
    return [] if batch is None else [one.payload for one in batch.members]


def test_nothing_waits_and_nothing_is_due() -> None:
    assert batching.next_batch(batch_buffer.Buffers(), BOUNDS, 1.0) is None
    assert batching.due_in(batch_buffer.Buffers(), BOUNDS, 1.0) is None


def test_an_input_waits_for_others_until_its_time_is_over() -> None:
    buffers = filled(("a", 1.0))
    assert batching.next_batch(buffers, BOUNDS, 1.005) is None
    assert batching.due_in(buffers, BOUNDS, 1.004) == pytest.approx(0.006)
    batch = batching.next_batch(buffers, BOUNDS, 1.01)
    assert batch is not None
    assert batch.flush is Flush.DUE
    assert len(buffers) == 0


def test_without_a_wait_it_is_due_at_once() -> None:
    batch = batching.next_batch(filled(("a", 1.0)), batch_buffer.Bounds(size=4, wait=0.0), 1.0)
    assert members(batch) == [("a", 1.0)]


def test_a_full_batch_is_due_at_once_and_takes_the_oldest() -> None:
    buffers = filled(*(("a", 1.0 + at / 1000) for at in range(6)))
    batch = batching.next_batch(buffers, BOUNDS, 1.006)
    assert batch is not None
    assert batch.flush is Flush.FULL
    assert members(batch) == [("a", 1.0 + at / 1000) for at in range(4)]
    assert len(buffers) == 2
    assert batching.next_batch(buffers, BOUNDS, 1.006) is None


def test_what_gathered_while_the_service_was_busy_is_due_when_it_is_free() -> None:
    batch = batching.next_batch(filled(("a", 1.0), ("a", 1.15)), BOUNDS, 1.2)
    assert members(batch) == [("a", 1.0), ("a", 1.15)]


def test_keys_are_never_mixed_and_the_oldest_that_is_due_goes_first() -> None:
    buffers = filled(("a", 1.2), ("b", 1.0), ("a", 1.3), ("b", 1.4))
    assert members(batching.next_batch(buffers, BOUNDS, 2.0)) == [("b", 1.0), ("b", 1.4)]
    assert members(batching.next_batch(buffers, BOUNDS, 2.0)) == [("a", 1.2), ("a", 1.3)]


def test_a_full_buffer_does_not_overtake_an_older_one_that_is_due() -> None:
    buffers = filled(*(("full", 1.1) for _ in range(4)), ("due", 1.0))
    assert members(batching.next_batch(buffers, BOUNDS, 1.2)) == [("due", 1.0)]


def test_a_full_buffer_overtakes_an_older_one_that_still_waits() -> None:
    buffers = filled(("waits", 1.0), *(("full", 1.001) for _ in range(4)))
    assert len(members(batching.next_batch(buffers, BOUNDS, 1.002))) == 4


def test_a_drain_waits_for_nobody() -> None:
    batch = batching.next_batch(filled(("a", 1.0)), BOUNDS, 1.0, is_draining=True)
    assert batch is not None
    assert batch.flush is Flush.DRAIN


def test_a_suspect_waits_for_nobody() -> None:
    assert batching.next_batch(filled(("a", 1.0), is_urgent=True), BOUNDS, 1.0) is not None


def test_the_sum_of_the_costs_bounds_a_batch() -> None:
    bounds = batch_buffer.Bounds(size=64, wait=10.0, cost=100)
    buffers = filled(*(("a", 1.0) for _ in range(5)), cost=30)
    batch = batching.next_batch(buffers, bounds, 1.0)
    assert batch is not None
    assert batch.flush is Flush.FULL
    assert [one.cost for one in batch.members] == [30, 30, 30]
    assert batching.next_batch(buffers, bounds, 1.0) is None


def test_an_input_over_the_cost_goes_alone() -> None:
    bounds = batch_buffer.Bounds(size=64, wait=10.0, cost=100)
    buffers = filled(("a", 1.0), ("a", 1.1), cost=150)
    assert members(batching.next_batch(buffers, bounds, 1.2)) == [("a", 1.0)]
    assert members(batching.next_batch(buffers, bounds, 1.2)) == [("a", 1.1)]


def test_an_input_that_is_taken_out_counts_no_more() -> None:
    bounds = batch_buffer.Bounds(size=2, wait=10.0, cost=100)
    buffers: batch_buffer.Buffers[Item] = batch_buffer.Buffers()
    first, second = (
        Item(payload=at, key="a", since=1.0, cost=60, is_urgent=True) for at in range(2)
    )
    buffers.put(first)
    assert buffers.remove(first)
    assert not buffers.remove(first)
    assert list(buffers) == []  # an idle buffer is freed
    buffers.put(second)
    assert members(batching.next_batch(buffers, bounds, 1.0)) == [1]


@pytest.mark.parametrize(("size", "left"), [(64, 32), (3, 1), (2, 1), (1, 1)])
def test_a_call_that_ran_out_of_memory_halves_the_bound(size: int, left: int) -> None:
    assert batching.halves(batch_buffer.Bounds(size=64, wait=0.0), size).size == left


def test_the_bound_never_grows_again() -> None:
    assert batching.halves(batch_buffer.Bounds(size=8, wait=0.0), 64).size == 8


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.integers(0, 50)), max_size=60),
    st.integers(1, 10),
    st.one_of(st.none(), st.integers(1, 100)),
)
def test_every_input_is_in_one_batch_within_the_bounds(
    arrivals: list[tuple[str, float, int]], size: int, most: int | None
) -> None:
    bounds = batch_buffer.Bounds(size=size, wait=0.5, cost=most)
    buffers: batch_buffer.Buffers[Item] = batch_buffer.Buffers()
    given = [
        Item(payload=at, key=key, since=since, cost=cost)
        for at, (key, since, cost) in enumerate(sorted(arrivals, key=lambda one: one[1]))
    ]
    for one in given:
        buffers.put(one)
    seen: list[object] = []
    while (batch := batching.next_batch(buffers, bounds, 11.0)) is not None:
        assert len({one.key for one in batch.members}) == 1
        assert len(batch.members) <= size
        costs = [one.cost for one in batch.members]
        assert most is None or len(costs) == 1 or sum(costs) <= most
        seen += [one.payload for one in batch.members]
    assert sorted(seen) == list(range(len(given)))  # type: ignore[type-var]
    assert not list(buffers)
