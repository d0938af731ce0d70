"""The autoscaler of a worker that shares its queues with others."""

from __future__ import annotations

import pytest

from tests.unit.autoscale.handmade import Scaled, other


def test_two_workers_do_not_each_scale_for_the_whole_queue(scaled: Scaled) -> None:
    scaled.peers = (other("gpu@two", replicas=1, least=1),)
    scaled.queued = 390
    assert scaled.after(1) == 2
    assert (scaled.seen["total"], scaled.seen["workers"]) == (4, 2)


def test_a_worker_that_is_gone_leaves_its_part_to_the_others(scaled: Scaled) -> None:
    scaled.peers = (other("gpu@two", replicas=1, least=1),)
    scaled.queued = 390
    scaled.after(1)
    scaled.peers = ()
    assert scaled.after(1) == 4


def test_a_replica_that_cannot_start_is_taken_over_and_tried_on(scaled: Scaled) -> None:
    scaled.queued = 190
    scaled.after(1)
    scaled.pool.failed = 2
    scaled.peers = (other("gpu@two", least=1),)
    assert scaled.after(1) >= 1
    assert scaled.told.capacity == 2
    assert scaled.pool.desired >= 1


@pytest.mark.parametrize(("states", "capacity"), [("sr", 3), ("ss", 0), ("rr", 4)])
def test_others_do_what_a_drained_worker_would(scaled: Scaled, states: str, capacity: int) -> None:
    names = {"s": "stopped", "r": "ready"}
    scaled.shows(*(names[state] for state in states))
    scaled.after(1)
    assert scaled.told.capacity == capacity


@pytest.mark.parametrize(
    ("states", "replicas"),
    [([], 2), (["starting", "entering"], 2), (["ready", "draining", "draining"], 3)],
)
def test_replicas_that_load_or_drain_count_in_what_others_are_told(
    scaled: Scaled, states: list[str], replicas: int
) -> None:
    scaled.pool.limit = 10  # two are wanted
    scaled.shows(*states)
    scaled.after(1)
    assert scaled.told.replicas == replicas


def test_replicas_that_all_fail_are_tried_on_and_not_made_anew(scaled: Scaled) -> None:
    scaled.queued = 100_000
    assert scaled.after(1) == 4
    scaled.pool.failed = 4
    assert {scaled.after(1) for _ in range(600)} == {4}


def test_a_replica_goes_to_a_worker_that_comes_only_when_that_has_had_time_to_load(
    scaled: Scaled,
) -> None:
    scaled.queued = 390
    scaled.peers = ()
    assert scaled.after(1) == 4
    scaled.peers = (other("gpu@two", replicas=2, least=1),)
    assert scaled.after(60) == 4
    assert scaled.after(200) == 2


def test_a_worker_whose_replicas_fail_now_and_then_moves_none(scaled: Scaled) -> None:
    scaled.queued = 390
    sizes = []
    for turn in range(20):
        scaled.peers = (other("gpu@two", replicas=4, least=1, capacity=1 if turn % 2 else 4),)
        sizes.append(scaled.after(30))
    assert sizes == sorted(sizes), "each change starts a replica that the next one drains"


def test_what_others_have_ordered_and_not_told_is_not_taken_back(scaled: Scaled) -> None:
    scaled.pool.known_scores = {}
    scaled.peers = (other("gpu@a", replicas=1, least=1, score=None),)
    scaled.queued = 16
    assert scaled.after(1) == 2
    scaled.queued = 11  # one is on its way into a worker, and not seen yet
    assert scaled.after(1) == 2


def test_scores_that_waver_move_no_replica(scaled: Scaled) -> None:
    scaled.queued = 390
    sizes = []
    for turn in range(20):
        scaled.peers = (other("gpu@two", replicas=2, score=20.0 if turn % 2 else 10.0),)
        sizes.append(scaled.after(10))
    assert sizes == sorted(sizes)
