"""Inputs that come again: those that kill children, and second deliveries."""

from __future__ import annotations

from typing import Any

import pytest
from billiard.exceptions import WorkerLostError

from gw_celery import errors
from gw_celery.pool import request
from tests.unit.pool.handmade import Child, Pool, Shared

# -- inputs that kill --


def test_a_suspect_that_comes_back_runs_alone(pool: Pool, child: Child) -> None:
    pool.start("a")
    pool.die(child)
    again, next_ = pool.submit("a"), pool.submit("b")
    fresh = Child()
    pool.dispatch(fresh)
    assert fresh.runs == ["a"]
    pool.accept(again)
    pool.done(again)
    pool.dispatch(fresh)
    assert fresh.runs == ["a", "b"]
    pool.accept(next_)
    pool.done(next_)
    third, fourth = pool.submit("a"), pool.submit("c")
    pool.dispatch(fresh)
    assert fresh.runs[2:] == ["a", "c"], "it survived alone, and is no suspect any more"
    assert not third.runs_alone
    assert not fourth.runs_alone


def test_an_input_that_kills_alone_too_often_is_given_up() -> None:
    shared = Shared()
    pool = Pool(shared=shared, max_deaths=2)
    heard = []
    for _ in range(3):
        child = Child()
        job = pool.start("a", child)
        pool.die(child)
        heard.append(pool.heard(job)[1])
    assert heard == [WorkerLostError, WorkerLostError, errors.PoisonedInput]
    assert shared.forgotten == ["a"], "sent again by its user, it begins anew"


def test_what_ran_beside_one_that_kills_is_answered() -> None:
    pool = Pool(max_deaths=1)
    child = Child()
    together = [pool.submit("killer"), pool.submit("innocent")]
    pool.dispatch()
    for job in together:
        pool.accept(job)
    pool.die(pool.children[0])
    assert [pool.heard(job)[1] for job in together] == [WorkerLostError, WorkerLostError]
    again = [pool.submit("killer"), pool.submit("innocent")]
    pool.dispatch(child)
    pool.accept(again[0])
    pool.die(child)
    child = Child()
    pool.dispatch(child)
    assert child.runs == ["innocent"]
    pool.accept(again[1])
    pool.done(again[1])
    assert [pool.heard(job)[1] for job in again] == [errors.PoisonedInput, "'text'"]


def test_an_input_that_other_workers_know_to_kill_never_starts() -> None:
    shared = Shared(a=3)
    pool = Pool(shared=shared, max_deaths=3)
    job = pool.submit("a", is_redelivered=True)
    assert pool.dispatch() == set()
    pool.inputs.settle_asked(request.now())
    assert pool.dispatch() == set()
    assert pool.heard(job) == [errors.PoisonedInput]
    assert shared.forgotten == ["a"], "sent again by its user, it begins anew"


def test_an_input_that_other_workers_suspect_runs_alone(child: Child) -> None:
    pool = Pool(child, shared=Shared(a=1), max_deaths=3)
    job = pool.submit("a", is_redelivered=True)
    pool.inputs.settle_asked(request.now())
    pool.submit("b")
    pool.dispatch()
    assert child.runs == ["a"]
    pool.accept(job)
    pool.done(job)
    assert pool.heard(job) == [("accepted", 100), "'text'"]


def test_only_what_was_delivered_before_is_asked_about(child: Child) -> None:
    shared = Shared(a=3)
    pool = Pool(child, shared=shared)
    pool.submit("a")
    assert shared.asked == []
    pool.dispatch()
    assert child.runs == ["a"]


def test_a_redis_that_does_not_answer_holds_an_input_for_two_seconds(child: Child) -> None:
    shared = Shared(a=3)
    shared.is_away = True
    pool = Pool(child, shared=shared)
    pool.submit("a", is_redelivered=True)
    pool.inputs.settle_asked(request.now() + 1.0)
    assert pool.dispatch() == set()
    pool.inputs.settle_asked(request.now() + 2.5)
    pool.dispatch()
    assert child.runs == ["a"]
    shared.is_away = False
    pool.inputs.settle_asked(request.now() + 3.0)
    pool.dispatch()
    assert child.runs == ["a"], "the late answer starts nothing a second time"


def test_an_input_that_nobody_can_be_asked_about_starts_at_once(child: Child) -> None:
    shared = Shared()
    shared.is_full = True
    pool = Pool(child, shared=shared)
    pool.submit("a", is_redelivered=True)
    pool.dispatch()
    assert child.runs == ["a"]


def test_a_child_that_was_never_well_blames_no_input() -> None:
    pool = Pool(max_deaths=1)
    for _ in range(3):
        child = Child()
        child.is_unfit = True
        job = pool.start("a", child)
        assert not job.runs_alone
        pool.die(child)
        assert pool.heard(job)[1] is WorkerLostError


def test_what_waits_for_a_service_can_be_given_to_other_workers_but_not_a_suspect() -> None:
    pool = Pool()
    pool.start("killer")
    pool.die(pool.children[0])
    suspect, waits = pool.submit("killer"), pool.submit("waits")
    pool.inputs.give_back("other")
    assert len(pool.inputs.waiting) == 2
    pool.inputs.give_back("embed")
    assert list(pool.inputs.waiting) == [suspect]
    assert waits.is_answered
    assert pool.heard(waits) == [("rejected", True)]


def test_a_shutdown_blames_no_input() -> None:
    pool = Pool(max_deaths=1)
    child = Child()
    pool.start("a", child)
    pool.die(child)
    child = Child()
    job = pool.start("a", child)
    assert job.runs_alone
    pool.die(child, is_closing=True)
    assert pool.heard(job)[1:] == [WorkerLostError]


def test_the_thread_that_talks_to_redis_ends_with_the_pool() -> None:
    shared = Shared()
    Pool(shared=shared).inputs.close()
    assert shared.is_closed


# -- twins: the same message, delivered again while it runs --


def test_a_second_delivery_is_answered_with_the_one_that_runs(pool: Pool, child: Child) -> None:
    job = pool.start("a")
    twin = pool.submit("a", is_redelivered=True)
    pool.dispatch()
    assert child.runs == ["a"]
    pool.done(job)
    assert pool.heard(job) == pool.heard(twin) == [("accepted", 100), "'text'"]


def test_a_second_delivery_is_answered_with_the_one_that_waits_for_a_slot(
    pool: Pool, child: Child
) -> None:
    job = pool.submit("a")
    twin = pool.submit("a", is_redelivered=True)
    pool.dispatch()
    assert child.runs == ["a"]
    pool.accept(job)
    pool.done(job)
    assert pool.heard(job) == pool.heard(twin) == [("accepted", 100), "'text'"]


@pytest.mark.parametrize(
    "given",
    [{"is_redelivered": False}, {"is_redelivered": True, "retries": 1}],
    ids=["another message", "a retry"],
)
def test_another_message_of_the_same_task_runs(
    pool: Pool, child: Child, given: dict[str, Any]
) -> None:
    pool.start("a")
    pool.submit("a", **given)
    pool.dispatch()
    assert child.runs == ["a", "a"]


def test_a_delivery_after_the_answer_runs(pool: Pool, child: Child) -> None:
    job = pool.start("a")
    job.terminate(15)
    pool.submit("a", is_redelivered=True)
    pool.dispatch()
    assert child.runs == ["a", "a"], "what was stopped answers nobody any more"


def test_a_twin_starts_elsewhere_with_its_input_and_is_answered_with_it() -> None:
    gone, other = Child(1), Child(2)
    pool = Pool(gone, other)
    job = pool.submit("a")
    pool.dispatch(gone)
    twin = pool.submit("a", is_redelivered=True)
    pool.die(gone)
    pool.dispatch(other)
    assert other.runs == ["a"]
    pool.accept(job)
    pool.done(job)
    assert pool.heard(job) == pool.heard(twin) == [("accepted", 2), "'text'"]


def test_a_twin_of_what_is_revoked_before_it_starts_is_revoked_too() -> None:
    child = Child()
    pool = Pool(child)
    job = pool.submit("a")
    pool.dispatch()
    twin = pool.submit("a", is_redelivered=True)
    pool.die(child)  # before the input began: it waits again
    for one in (job, twin):
        pool.requests[one].is_revoked = True
    pool.dispatch(Child())
    assert pool.heard(job) == ["revoked"]
    assert pool.heard(twin) == ["revoked"], "or its message is never acknowledged"
