"""Whose the cluster's replicas are."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gw_celery.policy import demand

clusters = st.lists(
    st.builds(
        demand.Peer,
        name=st.text("abcdef", min_size=1, max_size=3),
        capacity=st.integers(0, 6),
        least=st.integers(0, 3),
        score=st.floats(0.1, 10),
    ),
    unique_by=lambda peer: peer.name,
    max_size=12,
)


def parts(peers: list[demand.Peer], desired: int) -> dict[str, int]:
    first = demand.order(peers)[:desired]
    return {peer.name: first.count(peer.name) for peer in peers}


@given(clusters, st.integers(0, 80))
def test_the_parts_are_all_that_is_desired_or_all_that_there_can_be(
    peers: list[demand.Peer], desired: int
) -> None:
    room = sum(peer.capacity for peer in peers)
    assert sum(parts(peers, desired).values()) == min(desired, room)


@given(clusters, st.integers(0, 80))
def test_no_worker_has_more_than_its_capacity(peers: list[demand.Peer], desired: int) -> None:
    found = parts(peers, desired)
    assert all(found[peer.name] <= peer.capacity for peer in peers)


@given(clusters, st.integers(0, 80))
def test_one_more_replica_never_moves_another(peers: list[demand.Peer], desired: int) -> None:
    before, after = parts(peers, desired), parts(peers, desired + 1)
    assert all(after[name] >= part for name, part in before.items())


@given(clusters)
def test_minimums_come_first(peers: list[demand.Peer]) -> None:
    least = {peer.name: min(peer.least, peer.capacity) for peer in peers}
    assert parts(peers, sum(least.values())) == least


@given(clusters, st.randoms())
def test_it_does_not_matter_in_which_order_the_workers_are_told(peers, lot) -> None:
    other = list(peers)
    lot.shuffle(other)
    assert demand.order(other) == demand.order(peers)


def test_a_worker_with_twice_the_room_has_twice_the_part() -> None:
    peers = [demand.Peer("small", 10), demand.Peer("large", 20)]
    assert parts(peers, 12) == {"small": 4, "large": 8}


def test_where_scores_differ_the_quicker_worker_has_more() -> None:
    peers = [demand.Peer("slow", 10, score=1.0), demand.Peer("quick", 10, score=4.0)]
    assert parts(peers, 5) == {"slow": 1, "quick": 4}


def test_of_equals_the_first_name_comes_first() -> None:
    peers = [demand.Peer("b", 2), demand.Peer("a", 2)]
    assert demand.order(peers) == ["a", "b", "a", "b"]


def test_a_thousand_workers_find_their_parts() -> None:
    peers = [demand.Peer(f"{number:04}", 8) for number in range(1_000)]
    assert Counter(Counter(demand.order(peers)).values()) == {8: 1_000}
