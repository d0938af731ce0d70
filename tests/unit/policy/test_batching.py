from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery.policy import batching
from gw_celery.policy.batching import Flush


@dataclasses.dataclass(eq=False, kw_only=True)
class Item(batching.Waiting):
    payload: object


BOUNDS = batching.Bounds(size=4, wait=0.01)


def filled(*arrivals: tuple[str, float], **given: object) -> batching.Buffers[Item]:
    buffers: batching.Buffers[Item] = batching.Buffers()
    for key, since in arrivals:
        buffers.put(Item(payload=(key, since), key=key, since=since, **given))
    return buffers


def is_empty(buffers: batching.Buffers[Item]) -> bool:
    """Whether no key has a buffer: users may choose keys without end."""
    return buffers._by_key == {}


def members(batch: batching.Batch[Item] | None) -> list[object]:
    return [] if batch is None else [item.payload for item in batch.members]


def test_nothing_waits_and_nothing_is_due() -> None:
    assert batching.Buffers().next_batch(BOUNDS, 1.0) is None
    assert batching.Buffers().due_in(BOUNDS, 1.0) is None


def test_an_input_waits_for_others_until_its_time_is_over() -> None:
    buffers = filled(("a", 1.0))
    assert buffers.next_batch(BOUNDS, 1.005) is None
    assert buffers.due_in(BOUNDS, 1.004) == pytest.approx(0.006)
    batch = buffers.next_batch(BOUNDS, 1.01)
    assert batch is not None
    assert batch.flush is Flush.DUE
    assert is_empty(buffers)


def test_without_a_wait_it_is_due_at_once() -> None:
    batch = filled(("a", 1.0)).next_batch(batching.Bounds(size=4, wait=0.0), 1.0)
    assert members(batch) == [("a", 1.0)]


def test_a_full_batch_is_due_at_once_and_takes_the_oldest() -> None:
    buffers = filled(*(("a", 1.0 + at / 1000) for at in range(6)))
    batch = buffers.next_batch(BOUNDS, 1.006)
    assert batch is not None
    assert batch.flush is Flush.FULL
    assert members(batch) == [("a", 1.0 + at / 1000) for at in range(4)]
    assert buffers.next_batch(BOUNDS, 1.006) is None
    assert len(members(buffers.next_batch(BOUNDS, 1.006, is_draining=True))) == 2


def test_what_gathered_while_the_service_was_busy_is_due_when_it_is_free() -> None:
    batch = filled(("a", 1.0), ("a", 1.15)).next_batch(BOUNDS, 1.2)
    assert members(batch) == [("a", 1.0), ("a", 1.15)]


def test_keys_are_never_mixed() -> None:
    buffers = filled(("a", 1.2), ("b", 1.0), ("a", 1.3), ("b", 1.4))
    assert members(buffers.next_batch(BOUNDS, 2.0)) == [("b", 1.0), ("b", 1.4)]
    assert members(buffers.next_batch(BOUNDS, 2.0)) == [("a", 1.2), ("a", 1.3)]


FULL = [("full", 1.1)] * 4


@pytest.mark.parametrize(
    ("arrivals", "key"),
    [
        pytest.param([("young", 1.1), ("old", 1.0)], "old", id="the oldest that is due"),
        pytest.param([("old", 1.0), ("young", 1.1)], "old", id="the oldest that is due, put first"),
        pytest.param([*FULL, ("due", 1.0)], "due", id="not a full one that is younger"),
        pytest.param([("due", 1.0), *FULL], "due", id="not a full one put later"),
    ],
)
def test_the_oldest_batch_that_is_due_goes_first(
    arrivals: list[tuple[str, float]], key: str
) -> None:
    batch = filled(*arrivals).next_batch(BOUNDS, 1.2)
    assert batch is not None
    assert {item.key for item in batch.members} == {key}


def test_a_full_buffer_overtakes_an_older_one_that_still_waits() -> None:
    buffers = filled(("waits", 1.0), *(("full", 1.001) for _ in range(4)))
    assert len(members(buffers.next_batch(BOUNDS, 1.002))) == 4


def test_a_drain_waits_for_no_other_input() -> None:
    batch = filled(("a", 1.0)).next_batch(BOUNDS, 1.0, is_draining=True)
    assert batch is not None
    assert batch.flush is Flush.DRAIN


def test_a_suspect_waits_for_no_other_input() -> None:
    assert filled(("a", 1.0), is_urgent=True).next_batch(BOUNDS, 1.0) is not None


def test_the_sum_of_the_costs_bounds_a_batch() -> None:
    bounds = batching.Bounds(size=64, wait=10.0, cost=100)
    buffers = filled(*(("a", 1.0) for _ in range(5)), cost=30)
    batch = buffers.next_batch(bounds, 1.0)
    assert batch is not None
    assert batch.flush is Flush.FULL
    assert [item.cost for item in batch.members] == [30, 30, 30]
    assert buffers.next_batch(bounds, 1.0) is None


def test_an_input_over_the_cost_goes_alone() -> None:
    bounds = batching.Bounds(size=64, wait=10.0, cost=100)
    buffers = filled(("a", 1.0), ("a", 1.1), cost=150)
    assert members(buffers.next_batch(bounds, 1.2)) == [("a", 1.0)]
    assert members(buffers.next_batch(bounds, 1.2)) == [("a", 1.1)]


def test_an_input_that_is_taken_out_counts_no_more() -> None:
    bounds = batching.Bounds(size=2, wait=10.0, cost=100)
    buffers = filled(("a", 1.0), cost=60)
    urgent = Item(payload="urgent", key="a", since=1.0, cost=60, is_urgent=True)
    buffers.put(urgent)
    assert buffers.remove(urgent)
    assert not buffers.remove(urgent)
    assert buffers.next_batch(bounds, 1.0) is None
    assert members(buffers.next_batch(bounds, 11.0)) == [("a", 1.0)]
    assert is_empty(buffers)


def test_a_buffer_that_becomes_empty_is_freed() -> None:
    buffers: batching.Buffers[Item] = batching.Buffers()
    item = Item(payload=1, key="a", since=1.0)
    buffers.put(item)
    assert buffers.remove(item)
    assert is_empty(buffers)


@pytest.mark.parametrize(("size", "left"), [(64, 32), (3, 1), (2, 1), (1, 1)])
def test_a_call_that_ran_out_of_memory_halves_the_bound(size: int, left: int) -> None:
    assert batching.Bounds(size=64, wait=0.0).halved(size).size == left


def test_the_bound_never_grows_again() -> None:
    assert batching.Bounds(size=8, wait=0.0).halved(64).size == 8


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.integers(0, 50)), max_size=60),
    st.integers(1, 10),
    st.one_of(st.none(), st.integers(1, 100)),
)
def test_every_input_is_in_one_batch_within_the_bounds(
    arrivals: list[tuple[str, float, int]], size: int, most: int | None
) -> None:
    bounds = batching.Bounds(size=size, wait=0.5, cost=most)
    buffers: batching.Buffers[Item] = batching.Buffers()
    items = [
        Item(payload=at, key=key, since=since, cost=cost)
        for at, (key, since, cost) in enumerate(sorted(arrivals, key=lambda arrival: arrival[1]))
    ]
    for item in items:
        buffers.put(item)
    seen: list[object] = []
    while (batch := buffers.next_batch(bounds, 11.0)) is not None:
        assert len({item.key for item in batch.members}) == 1
        assert len(batch.members) <= size
        costs = [item.cost for item in batch.members]
        assert most is None or len(costs) == 1 or sum(costs) <= most
        seen += [item.payload for item in batch.members]
    assert sorted(seen) == list(range(len(items)))  # type: ignore[type-var]
    assert is_empty(buffers)
