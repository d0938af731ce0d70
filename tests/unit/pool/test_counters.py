"""The sums of a worker's inputs, and every way in which an input comes and goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gw_celery import errors
from gw_celery.pool import counters, request
from gw_celery.protocol import frames, snapshot
from tests.unit.pool.handmade import Child, Pool, Shared


def seen(pool: Pool) -> snapshot.Counters:
    return pool.inputs.tallies.seen().get("embed", snapshot.Counters())


def counts(pool: Pool) -> tuple[float, ...]:
    """Workload that arrived, waits, runs, was served and was given back."""
    now = seen(pool)
    return now.arrived, now.waiting, now.running, now.served, now.given_back


def test_an_input_arrives_waits_runs_and_is_served(pool: Pool) -> None:
    job = pool.submit("a", headers={"gw-workload": 4.0})
    assert counts(pool) == (4, 4, 0, 0, 0)
    pool.dispatch()
    assert counts(pool) == (4, 0, 4, 0, 0)
    pool.accept(job)
    assert counts(pool) == (4, 0, 4, 0, 0)
    pool.done(job)
    assert counts(pool) == (4, 0, 0, 4, 0)
    assert seen(pool).served_inputs == seen(pool).arrived_inputs == 1


@pytest.mark.parametrize("odd", [None, "much", -1.0, float("nan"), [3.0], True], ids=repr)
def test_a_message_with_an_odd_workload_counts_as_one(pool: Pool, odd: Any) -> None:
    pool.submit("a", headers={"gw-workload": odd})
    pool.submit("b")
    assert counts(pool) == (2, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("outcome", "requeue", "is_served"),
    [
        (frames.Outcome.FAILURE, False, True),
        (frames.Outcome.RETRY, False, True),
        (frames.Outcome.IGNORE, False, True),
        (frames.Outcome.REJECT, False, True),
        (frames.Outcome.REJECT, True, False),
        (frames.Outcome.EXIT, False, False),
        (frames.Outcome.UNSTORED, False, False),
    ],
)
def test_what_ran_to_its_end_is_served_unless_the_broker_gets_it_back(
    pool: Pool, outcome: frames.Outcome, requeue: bool, is_served: bool
) -> None:
    job = pool.start("a")
    texts = ["proj.Oops", "Oops('x')", "x", "Traceback: x"]
    pool.report(job, frames.Report.ERROR, outcome, *texts, requeue)
    assert counts(pool) == (1, 0, 0, int(is_served), int(not is_served))


def test_what_reaches_its_hard_limit_is_answered_and_leaves_once(pool: Pool) -> None:
    job = pool.start("a", timeout=1.0)
    pool.inputs.expire(request.now() + 2.0)
    assert counts(pool) == (1, 0, 0, 1, 0)
    pool.report(job, frames.Report.GONE)
    assert counts(pool) == (1, 0, 0, 1, 0)


def test_what_is_stopped_leaves_once_before_and_after_its_start(pool: Pool) -> None:
    running = pool.start("a")
    waiting = pool.submit("b")
    running.terminate(15)
    waiting.terminate(15)
    assert counts(pool) == (2, 0, 0, 0, 2)
    pool.report(running, frames.Report.GONE)
    assert counts(pool) == (2, 0, 0, 0, 2)


def test_what_a_lost_child_had_not_begun_waits_again_and_the_rest_is_given_back() -> None:
    gone = Child()
    pool = Pool(gone)
    pool.start("a", gone)
    pool.submit("b")
    pool.dispatch(gone)
    pool.die(gone)
    assert counts(pool) == (2, 1, 0, 0, 1)
    other = Child()
    pool.dispatch(other)
    assert counts(pool) == (2, 0, 1, 0, 1)


def test_a_shutdown_gives_back_all_that_its_children_held() -> None:
    gone = Child()
    pool = Pool(gone)
    pool.start("a", gone)
    pool.submit("b")
    pool.dispatch(gone)
    pool.die(gone, is_closing=True)
    assert counts(pool) == (2, 0, 0, 0, 2)


def test_what_is_forgotten_at_a_lost_connection_counts_once_when_it_comes_again() -> None:
    pool = Pool(shared=Shared())
    pool.start("running")
    pool.submit("waiting")
    pool.submit("asked", is_redelivered=True)
    pool.inputs.forget_waiting()
    assert counts(pool) == (3, 0, 1, 0, 2)
    pool.submit("waiting", is_redelivered=True)
    assert counts(pool) == (4, 1, 1, 0, 2)


def test_a_second_delivery_of_what_is_here_counts_nothing(pool: Pool) -> None:
    job = pool.start("a")
    pool.submit("a", is_redelivered=True)
    pool.done(job)
    assert counts(pool) == (1, 0, 0, 1, 0)


def test_what_is_revoked_or_expires_is_given_back(pool: Pool) -> None:
    job = pool.submit("a")
    pool.requests[job].is_revoked = True
    pool.dispatch()
    assert counts(pool) == (1, 0, 0, 0, 1)


def test_what_goes_to_other_workers_because_no_replica_is_ready_is_given_back(pool: Pool) -> None:
    pool.submit("a")
    pool.inputs.give_back("embed")
    assert counts(pool) == (1, 0, 0, 0, 1)


def test_what_kills_and_is_given_up_is_given_back() -> None:
    pool = Pool(shared=Shared(a=3), max_deaths=3)
    job = pool.submit("a", is_redelivered=True)
    pool.inputs.settle_asked(request.now())
    assert pool.heard(job) == [errors.PoisonedInput]
    assert counts(pool) == (1, 0, 0, 0, 1)


def test_a_message_that_cannot_run_does_not_arrive(pool: Pool) -> None:
    pool.submit("a", timeout="soon")  # type: ignore[arg-type]
    assert counts(pool) == (0, 0, 0, 0, 0)


def test_what_has_not_begun_when_the_worker_ends_cold_is_given_back(pool: Pool) -> None:
    pool.submit("a")
    pool.dispatch()
    pool.inputs.abandon_unaccepted()
    assert counts(pool) == (1, 0, 0, 0, 1)


# -- the sums alone --


def test_services_are_told_apart_and_the_newest_inputs_count_most_in_the_mean() -> None:
    tallies = counters.Tallies()
    tallies.arrive(1, "embed", 10.0)
    tallies.arrive(2, "chat", 2.0)
    assert {key: one.mean for key, one in tallies.seen().items()} == {"embed": 10.0, "chat": 2.0}
    for number in range(3, 100):
        tallies.arrive(number, "embed", 20.0)
    assert 19.0 < tallies.seen()["embed"].mean < 20.0
    assert snapshot.mean_workload(tallies.seen().values()) > 19.0
    assert snapshot.mean_workload([]) == 1.0


def test_the_seconds_of_a_slot_are_those_of_what_was_served() -> None:
    tallies = counters.Tallies()
    for number in range(2):
        tallies.arrive(number, "embed", 1.0)
        tallies.start(number, 10.0)
    tallies.serve(0, 12.5, is_success=True)
    tallies.give_back(1)
    assert tallies.seen()["embed"].busy == 2.5


def test_what_gave_no_value_is_served_and_failed() -> None:
    tallies = counters.Tallies()
    for number in range(3):
        tallies.arrive(number, "embed", 2.0)
        tallies.start(number, 10.0)
        tallies.serve(number, 11.0, is_success=number == 0)
    seen = tallies.seen()["embed"]
    assert (seen.served, seen.failed) == (6.0, 4.0)


def test_what_is_refused_is_counted_apart() -> None:
    tallies = counters.Tallies()
    for number in range(2):
        tallies.arrive(number, "embed", 2.0)
        tallies.start(number, 10.0)
        tallies.serve(number, 11.0, is_success=False, is_refused=number == 0)
    seen = tallies.seen()["embed"]
    assert (seen.refused_inputs, seen.failed) == (1, 4.0)


def test_rounding_leaves_nothing_behind() -> None:
    tallies = counters.Tallies()
    for number in range(1000):
        tallies.arrive(number, "embed", 0.1 * (number % 7))
    for number in range(1000):
        tallies.start(number, 0.0)
    assert tallies.seen()["embed"].waiting == 0.0


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "start", "wait_again", "serve", "give_back"]),
        st.integers(0, 9),
        st.sampled_from(["embed", "chat"]),
        st.floats(0, 1e12),
    ),
    max_size=200,
)


@given(EVENTS)
def test_whatever_happens_the_sums_are_conserved(events: list[tuple[str, int, str, float]]) -> None:
    tallies, held, clock = counters.Tallies(), set[int](), 0.0
    for what, number, service, workload in events:
        clock += 1.0
        if what == "arrive":
            if number not in held:
                held.add(number)
                tallies.arrive(number, service, workload)
            continue
        needs_clock = what in ("start", "serve")
        more = {"is_success": workload < 1} if what == "serve" else {}
        getattr(tallies, what)(number, *([clock] if needs_clock else []), **more)
        if what in ("serve", "give_back"):
            held.discard(number)
    for one in tallies.seen().values():
        total = one.waiting + one.running + one.served + one.given_back
        assert total == pytest.approx(one.arrived, rel=1e-9, abs=1e-2)
        counted = one.waiting_inputs + one.running_inputs + one.served_inputs
        assert counted + one.given_back_inputs == one.arrived_inputs
        assert min(dataclasses.astuple(one)) >= 0
    assert sum(one.waiting_inputs + one.running_inputs for one in tallies.seen().values()) == len(
        held
    )
