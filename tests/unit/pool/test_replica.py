from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import gw_celery as gw
from gw_celery import conf
from gw_celery.gpus import devices
from gw_celery.policy import probes
from gw_celery.pool import replica as pool_replica
from gw_celery.pool import request_table
from gw_celery.protocol import snapshot

LIMITS = conf.Settings(
    boot_timeout=1, start_timeout=1, benchmark_timeout=1, drain_timeout=1, heartbeat_timeout=1
)


class Child:
    """A process of which only its life and what it holds are looked at."""

    def __init__(self, *, held: int = 0, is_ready: bool = True) -> None:
        self.state = pool_replica.ChildState(LIMITS, 0.0)
        self.requests = dict.fromkeys(range(held))
        self.pid = 100
        self.served = 0
        self.resident_bytes = 0
        self.lag = 0.25
        self.slots = request_table.Slots({})
        self.checks = None
        self.reason = ""
        self.is_unfit = False
        self.is_ill = False
        if is_ready:
            self.state.loaded(1.0)
            self.state.entered(2.0)
            self.state.probed(2.0)
            self.state.measured(2.0)


def replicas_of(count: int) -> pool_replica.ReplicaSet:
    """This many replicas, with an idle child in each."""
    made = pool_replica.ReplicaSet(None)
    made.resize(count)
    for place in made:
        place.child = Child()
    return made


def at(made: pool_replica.ReplicaSet, number: int) -> Any:
    return next(place for place in made if place.number == number)


def numbers(found: Any) -> list[int]:
    return [place.number for place in found]


# -- the size --


def test_a_pool_grows_by_the_lowest_numbers() -> None:
    made = pool_replica.ReplicaSet(None)
    assert made.resize(2) == []
    assert made.resize(3) == []
    assert numbers(made) == [0, 1, 2]


def test_a_number_that_is_free_is_used_again() -> None:
    made = replicas_of(3)
    made.remove(at(made, 1))
    made.resize(3)
    assert numbers(made) == [0, 1, 2]
    assert at(made, 1).child is None


def test_a_number_is_taken_until_its_replica_has_drained() -> None:
    made = replicas_of(2)
    (drained,) = made.resize(1)
    made.resize(2)
    assert (drained.number, numbers(made)) == (1, [0, 1, 2]), "it stands for its devices"
    assert [place.is_wanted for place in made] == [True, False, True]


def test_what_is_added_to_a_pool_that_is_drained_is_not_started_either() -> None:
    made = replicas_of(2)
    made.hold(None)
    made.resize(3)
    assert not any(place.should_run for place in made)
    made.restart(0)
    made.resize(4)
    assert [place.should_run for place in made] == [True, False, False, False]
    made.restart(None)
    made.resize(5)
    assert all(place.should_run for place in made)


def test_a_pool_shrinks_by_the_highest_number_of_what_is_equally_idle() -> None:
    made = replicas_of(3)
    assert numbers(made.resize(1)) == [2, 1]
    assert [place.should_run for place in made] == [True, False, False]


def test_a_pool_shrinks_by_what_serves_nothing_and_then_by_the_least_loaded() -> None:
    made = replicas_of(5)
    at(made, 0).child = None
    at(made, 1).child = Child(held=3, is_ready=False)
    at(made, 2).child = Child(held=2)
    at(made, 3).child = Child(held=1)
    at(made, 4).child = Child(held=4)
    assert numbers(made.resize(1)) == [0, 1, 3, 2]


def test_a_replica_that_drains_for_good_is_drained_once() -> None:
    made = replicas_of(3)
    made.resize(1)
    assert made.resize(1) == []
    assert numbers(made.resize(0)) == [0]


def test_a_replica_that_is_gone_can_be_removed_twice() -> None:
    made = replicas_of(2)
    gone = at(made, 1)
    made.remove(gone)
    made.remove(gone)
    assert numbers(made) == [0]


# -- drained and restarted by an operator --


def test_a_replica_that_is_held_stays_and_runs_nothing_until_a_restart() -> None:
    made = replicas_of(3)
    assert numbers(made.hold(0)) == [0]
    assert [place.should_run for place in made] == [False, True, True]
    assert made.resize(3) == []
    at(made, 0).child = None
    made.restart(0)
    assert [place.should_run for place in made] == [True, True, True]


def test_all_replicas_can_be_held_and_restarted() -> None:
    made = replicas_of(2)
    assert numbers(made.hold(None)) == [0, 1]
    assert not any(place.should_run for place in made)
    made.restart(None)
    assert all(place.should_run for place in made)


def test_a_replica_that_drains_for_good_is_not_restarted() -> None:
    made = replicas_of(2)
    made.resize(1)
    made.restart(None)
    assert not at(made, 1).should_run
    assert made.next_to_restart() is at(made, 0)
    assert made.next_to_restart() is None


def test_replicas_restart_one_at_a_time() -> None:
    made = replicas_of(3)
    made.restart(None)
    restarted = []
    while (place := made.next_to_restart()) is not None:
        restarted.append(place.number)
        place.child.state.drain(3.0)
        assert made.next_to_restart() is None, "another one still drains"
        place.child = None
        assert made.next_to_restart() is None, "its next child has not started"
        place.child = Child(is_ready=False)
        assert made.next_to_restart() is None, "its next child still loads"
        place.child = Child()
    assert restarted == [0, 1, 2]


def test_a_replica_that_loads_is_restarted_when_it_is_ready() -> None:
    made = replicas_of(2)
    at(made, 0).child = Child(is_ready=False)
    made.restart(0)
    assert made.next_to_restart() is None
    at(made, 0).child = Child()
    assert made.next_to_restart() is at(made, 0)


def test_a_replica_that_is_not_ready_is_restarted_at_once() -> None:
    made = replicas_of(3)
    unready: Any = at(made, 1).child
    unready.state.wants_inputs(3.0, False)
    made.restart(None)
    assert made.next_to_restart() is at(made, 1)
    assert made.next_to_restart() is None, "the others wait until it is ready"
    at(made, 1).child = Child()
    assert made.next_to_restart() is at(made, 0)


def test_one_replica_is_restarted_alone_and_once() -> None:
    made = replicas_of(3)
    made.restart(1)
    made.restart(1)
    assert made.next_to_restart() is at(made, 1)
    assert made.next_to_restart() is None


def test_a_replica_whose_child_has_died_meanwhile_needs_no_restart() -> None:
    made = replicas_of(3)
    made.restart(None)
    made.remove(at(made, 0))
    at(made, 1).child = None
    assert made.next_to_restart() is None
    at(made, 1).child = Child()
    assert made.next_to_restart() is at(made, 2)
    assert made.next_to_restart() is None


@pytest.mark.parametrize("others", ["held", "unwanted"])
def test_a_replica_that_should_not_run_holds_up_no_restart(others: str) -> None:
    made = replicas_of(2)
    at(made, 0).child.requests = {1: None}
    if others == "held":
        made.hold(1)
    else:
        made.resize(1)
    at(made, 1).child = None
    made.restart(0)
    assert made.next_to_restart() is at(made, 0)


# -- one replica --


def test_a_place_forgets_the_child_that_is_gone_and_no_other() -> None:
    place, old, new = pool_replica.Replica(0), Child(), Child()
    place.child, place.successor = old, new
    place.child_ended(old, "", 0.0, is_expected=True)
    assert (place.child, place.successor) == (None, new)
    place.child_ended(old, "", 0.0, is_expected=True)
    assert place.successor is new
    place.child_ended(new, "", 0.0, is_expected=True)
    assert place.successor is None


def test_a_replica_that_serves_shows_its_child() -> None:
    place, child = pool_replica.Replica(3), Child(held=2)
    place.child = child
    child.resident_bytes = 4096
    place.restarts, place.last_error = 1, "it died"
    assert place.as_snapshot(slots=8, now=12.0) == snapshot.Replica(
        number=3,
        state="ready",
        pid=100,
        slots=8,
        in_flight=2,
        restarts=1,
        last_error="it died",
        seconds_in_state=10.0,
        start_up=2.0,
        lag=0.25,
        resident_bytes=4096,
    )


@pytest.mark.parametrize(("now", "wait"), [(5.5, 0.5), (60.0, 0.0)])
def test_a_replica_without_a_child_shows_when_the_next_one_starts(now: float, wait: float) -> None:
    place = pool_replica.Replica(0)
    assert place.start_failed(5.0) == 1.0
    seen = place.as_snapshot(slots=8, now=now)
    assert (seen.state, seen.retry_in, seen.pid, seen.slots) == ("failed", wait, None, 0)


@pytest.mark.parametrize("attribute", ["is_held", "is_wanted"])
def test_a_replica_that_is_not_to_run_is_stopped(attribute: str) -> None:
    place = pool_replica.Replica(0)
    setattr(place, attribute, not getattr(place, attribute))
    assert place.as_snapshot(slots=8, now=1.0).state == "stopped"


# -- devices --

SHARES = [
    [devices.Device(name="NVIDIA L4", token=f"GPU-{number}", memory_gb=24, index=number)]
    for number in range(3)
]


def tokens(made: pool_replica.ReplicaSet) -> dict[int, tuple[str, ...]]:
    return {place.number: place.as_snapshot(1, 0.0).devices for place in made}


def test_a_replica_has_the_devices_of_its_number() -> None:
    made = pool_replica.ReplicaSet(SHARES)
    made.resize(2)
    assert tokens(made) == {0: ("GPU-0",), 1: ("GPU-1",)}


def test_a_replica_without_devices_shows_none() -> None:
    assert tokens(replicas_of(1)) == {0: ()}


def test_there_are_no_more_replicas_than_shares() -> None:
    made = pool_replica.ReplicaSet(SHARES)
    made.resize(5)
    assert list(tokens(made)) == [0, 1, 2]


def test_a_replica_whose_devices_are_in_use_starts_when_they_are_free() -> None:
    made = pool_replica.ReplicaSet(SHARES)
    made.resize(3)
    for place in made:
        place.child = Child(held=0 if place.number == 1 else 1)
    (drained,) = made.resize(2)
    assert drained.number == 1
    assert made.resize(3) == []
    assert list(tokens(made)) == [0, 1, 2], "the one that drains is still there"
    assert [place.number for place in made if place.is_wanted] == [0, 2]
    made.remove(drained)
    made.complete()
    assert [place.number for place in made if place.is_wanted] == [0, 1, 2]
    assert at(made, 1) is not drained
    assert at(made, 1).devices == SHARES[1]


def test_a_replica_that_leaves_for_good_is_not_replaced() -> None:
    made = pool_replica.ReplicaSet(SHARES)
    made.resize(2)
    (drained,) = made.resize(1)
    made.remove(drained)
    made.complete()
    assert len(list(made)) == 1


def test_the_end_of_a_child_that_was_never_well_is_a_failed_start_however_long_it_served() -> None:
    (place,) = replicas_of(1)
    waits = []
    for _ in range(3):
        place.child = Child(held=2)
        place.child.is_unfit = place.child.is_ill = True
        for number in place.child.requests:
            place.child.requests[number] = SimpleNamespace(is_accepted=True)
        place.child_ended(place.child, "its liveness probe failed", 1000.0, is_expected=False)
        waits.append(place.retry_at - 1000.0)
    assert waits == [1, 2, 4]


def test_a_child_that_falls_ill_soon_after_each_start_is_started_ever_later() -> None:
    (place,) = replicas_of(1)
    waits = []
    for age in (10.0, 10.0, 63.0, 64.0, 10.0):
        place.child = Child(held=2)  # READY at 2.0
        place.child.is_ill = True
        for number in place.child.requests:
            place.child.requests[number] = SimpleNamespace(is_accepted=True)
        place.child_ended(place.child, "its liveness probe failed", 2.0 + age, is_expected=False)
        waits.append(place.retry_at - 2.0 - age)
    assert waits == [1, 2, 4, 0, 1]


def test_what_the_probes_of_a_child_said_is_seen() -> None:
    (place,) = replicas_of(1)
    place.child.checks = probes.Checks([("proj.Model", gw.Probe.on("health", failures=1))])
    (check,) = place.child.checks
    place.child.slots.unready = {"proj.Model"}
    assert place.as_snapshot(4, 10.0).probes == (
        snapshot.Probe(name="Model.health", kind="liveness"),
    )
    check.called(1, 5.0)
    check.answered(probes.Answer(is_ok=False, detail="returned False", seconds=0.5))
    seen = place.as_snapshot(4, 10.0)
    assert seen.unready == ("proj.Model",)
    assert seen.probes == (
        snapshot.Probe(
            name="Model.health",
            kind="liveness",
            is_ok=False,
            failures=1,
            is_failing=True,
            detail="returned False",
            seconds=0.5,
        ),
    )
