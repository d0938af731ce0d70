"""Whose the cluster's replicas are."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gw_celery.policy import apportionment

clusters = st.lists(
    st.builds(
        apportionment.Peer,
        name=st.text("abcdef", min_size=1, max_size=3),
        capacity=st.integers(0, 6),
        least=st.integers(0, 3),
        score=st.floats(0.1, 10),
    ),
    unique_by=lambda peer: peer.name,
    max_size=12,
)


def parts(peers: list[apportionment.Peer], desired: int) -> dict[str, int]:
    return {peer.name: apportionment.part(tuple(peers), peer.name, desired) for peer in peers}


@given(clusters, st.integers(0, 80))
def test_the_parts_are_all_that_is_desired_or_all_that_there_can_be(
    peers: list[apportionment.Peer], desired: int
) -> None:
    room = sum(peer.capacity for peer in peers)
    assert sum(parts(peers, desired).values()) == min(desired, room)


@given(clusters, st.integers(0, 80))
def test_no_worker_has_more_than_its_capacity(
    peers: list[apportionment.Peer], desired: int
) -> None:
    found = parts(peers, desired)
    assert all(found[peer.name] <= peer.capacity for peer in peers)


@given(clusters, st.integers(0, 80))
def test_one_more_replica_never_moves_another(
    peers: list[apportionment.Peer], desired: int
) -> None:
    before, after = parts(peers, desired), parts(peers, desired + 1)
    assert all(after[name] >= part for name, part in before.items())


@given(clusters)
def test_minimums_come_first(peers: list[apportionment.Peer]) -> None:
    least = {peer.name: min(peer.least, peer.capacity) for peer in peers}
    assert parts(peers, sum(least.values())) == least


@given(clusters, st.randoms())
def test_it_does_not_matter_in_which_order_the_workers_are_told(peers, lot) -> None:
    other = list(peers)
    lot.shuffle(other)
    assert apportionment.order(other) == apportionment.order(peers)


def test_a_worker_with_twice_the_room_has_twice_the_part() -> None:
    peers = [apportionment.Peer("small", 10), apportionment.Peer("large", 20)]
    assert parts(peers, 12) == {"small": 4, "large": 8}


def test_where_scores_differ_the_quicker_worker_has_more() -> None:
    peers = [apportionment.Peer("slow", 10, score=1.0), apportionment.Peer("quick", 10, score=4.0)]
    assert parts(peers, 5) == {"slow": 1, "quick": 4}


def test_of_equals_the_first_name_comes_first() -> None:
    peers = [apportionment.Peer("b", 2), apportionment.Peer("a", 2)]
    assert apportionment.order(peers) == ["a", "b", "a", "b"]


def test_a_part_grows_at_the_replicas_that_are_ones_own() -> None:
    peers = (apportionment.Peer("a", 3), apportionment.Peer("b", 1, least=1))
    assert [apportionment.part(peers, "a", desired) for desired in range(6)] == [0, 0, 1, 2, 3, 3]
    assert [apportionment.part(peers, "b", desired) for desired in range(6)] == [0, 1, 1, 1, 1, 1]


def test_an_unknown_worker_has_no_replica() -> None:
    assert apportionment.part((apportionment.Peer("a", 3),), "me", 3) == 0


def test_a_thousand_workers_find_their_parts() -> None:
    peers = [apportionment.Peer(f"{number:04}", 8) for number in range(1_000)]
    assert Counter(Counter(apportionment.order(peers)).values()) == {8: 1_000}
