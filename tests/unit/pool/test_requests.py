from __future__ import annotations

from typing import Any

import pytest
from billiard.exceptions import Terminated, WorkerLostError

from gw_celery import errors
from gw_celery.pool import request
from gw_celery.protocol import frames
from tests.unit.pool.handmade import Child, Pool, Shared

# -- the way of one input --


def test_an_input_waits_runs_and_is_answered(pool: Pool, child: Child) -> None:
    job = pool.submit("a")
    assert len(pool.inputs.waiting) == 1
    assert pool.inputs.in_flight() == 0
    assert pool.dispatch() == {child}
    assert child.told == [(frames.Order.RUN, job.number, *job.args)]
    assert pool.inputs.in_flight() == 1
    pool.accept(job)
    pool.done(job)
    assert pool.heard(job) == [("accepted", 100), "'text'"]
    assert pool.inputs.in_flight() == 0
    assert (child.jobs, child.room.total, child.served) == ({}, 0, 1)
    assert pool.let_go == [child]


def test_a_child_gets_all_its_inputs_in_one_writing() -> None:
    writings = []
    child = Child()
    child.send = lambda *orders: writings.append(len(orders))
    pool = Pool(child)
    pool.submit("a")
    pool.submit("b")
    pool.dispatch()
    assert writings == [2]


def test_an_input_over_the_slots_starts_when_one_is_free(pool: Pool, child: Child) -> None:
    first, *_ = [pool.submit(one) for one in "abc"]
    pool.dispatch()
    assert child.runs == ["a", "b"]
    assert pool.dispatch() == set()
    pool.accept(first)
    pool.done(first)
    pool.dispatch()
    assert child.runs == ["a", "b", "c"]


def test_a_failure_frees_the_slot_as_an_answer_does(pool: Pool, child: Child) -> None:
    job = pool.start("a")
    texts = ["proj.Oops", "Oops('x')", "x", "Traceback: x"]
    pool.report(job, frames.Report.ERROR, frames.Outcome.FAILURE, *texts, False)
    assert pool.heard(job) == [("accepted", 100), "Traceback: x"]
    assert child.room.total == 0


def test_an_input_that_its_child_refused_is_counted(pool: Pool) -> None:
    name = f"{errors.QueueTimeExceeded.__module__}.QueueTimeExceeded"
    for raised in ("proj.Oops", name):
        texts = [raised, "x", "x", "Traceback: x"]
        pool.report(pool.start("a"), frames.Report.ERROR, frames.Outcome.FAILURE, *texts, False)
    (tallied,) = pool.inputs.tallies.seen().values()
    assert (tallied.failed, tallied.refused_inputs) == (2.0, 1)


def test_an_input_that_its_child_has_dropped_is_lost(pool: Pool, child: Child) -> None:
    job = pool.start("a")
    pool.report(job, frames.Report.GONE)
    assert pool.heard(job)[1:] == [WorkerLostError]
    assert child.room.total == 0


@pytest.mark.parametrize("kind", [frames.Report.ACCEPT, frames.Report.DONE, frames.Report.GONE])
def test_a_report_of_what_the_child_does_not_hold_is_garbage(pool: Pool, kind: Any) -> None:
    job = pool.start("a", pool.children[0])
    with pytest.raises(frames.Garbage, match=f"a {kind} report of job {job.number}"):
        pool.inputs.handle(Child(), [kind, job.number, 0.0, 0.0], request.now())
    pool.done(job)
    with pytest.raises(frames.Garbage, match="which it does not hold"):
        pool.done(job)
    assert pool.heard(job) == [("accepted", 100), "'text'"]


def test_an_input_that_is_withdrawn_while_it_waits_is_never_sent(pool: Pool, child: Child) -> None:
    job = pool.submit("a")
    pool.requests[job].is_revoked = True
    pool.submit("b")
    pool.submit("c")
    pool.dispatch()
    assert child.runs == ["b", "c"], "the slot of what was withdrawn is free"
    assert pool.heard(job) == ["revoked"]
    assert pool.inputs.in_flight() == 2


def test_what_has_not_started_is_dropped_and_what_runs_goes_on() -> None:
    shared = Shared()
    pool = Pool(shared=shared)
    running = pool.start("a")
    waiting, asked = pool.submit("b"), pool.submit("c", is_redelivered=True)
    pool.inputs.forget_waiting()
    pool.inputs.settle_asked(request.now())
    assert pool.dispatch() == set()
    pool.done(running)
    assert pool.heard(running) == [("accepted", 100), "'text'"]
    assert pool.heard(waiting) == pool.heard(asked) == []


# -- stops --


def test_a_waiting_input_that_is_stopped_never_runs(pool: Pool, child: Child) -> None:
    job = pool.submit("a")
    job.terminate(15)
    assert pool.heard(job) == [("accepted", 0), Terminated], (
        "Celery announces a revocation when the input is accepted"
    )
    pool.dispatch()
    assert child.told == []


def test_an_input_that_is_asked_about_and_stopped_never_runs() -> None:
    pool = Pool(shared=Shared())
    job = pool.submit("a", is_redelivered=True)
    job.terminate(15)
    pool.inputs.settle_asked(request.now() + 60)
    assert pool.dispatch() == set()
    assert pool.heard(job) == [("accepted", 0), Terminated]


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_stopped_input_is_answered_at_once_and_its_child_told(
    pool: Pool, child: Child, has_begun: bool
) -> None:
    job = pool.submit("a")
    pool.dispatch()
    if has_begun:
        pool.accept(job)
    job.terminate(15)
    job.terminate(15)
    assert pool.heard(job) == [("accepted", 100), Terminated]
    assert child.stopped == [job.number]
    assert pool.inputs.in_flight() == 0
    assert child.room.total == 1, "the body may still run"
    pool.accept(job)
    pool.done(job)
    assert pool.heard(job) == [("accepted", 100), Terminated]
    assert child.room.total == 0


def test_a_child_that_cannot_stop_an_input_is_replaced(
    pool: Pool, child: Child, caplog: pytest.LogCaptureFixture
) -> None:
    job = pool.start("a")
    job.terminate(15)
    pool.inputs.expire(request.now() + 4.0)
    assert pool.stuck == []
    pool.inputs.expire(request.now() + 6.0)
    pool.inputs.expire(request.now() + 60.0)
    assert pool.stuck == [child]
    assert "task proj.embed[a] did not end 5 s after it was stopped" in caplog.text


def test_a_child_that_stops_an_input_in_time_stays(pool: Pool) -> None:
    job = pool.start("a")
    job.terminate(15)
    pool.report(job, frames.Report.GONE)
    pool.inputs.expire(request.now() + 60.0)
    assert pool.stuck == []
    assert pool.inputs.limits.next_in(request.now()) is None


def test_what_has_not_begun_is_left_to_another_worker(pool: Pool, child: Child) -> None:
    begun = pool.start("a", timeout=1.0)
    sent = pool.submit("b")
    pool.dispatch()
    pool.inputs.abandon_unaccepted()
    assert pool.inputs.in_flight() == 1
    pool.accept(sent)
    pool.done(sent)
    assert pool.heard(sent) == [], "an accepted input is acknowledged, and would be lost"
    pool.inputs.expire(request.now() + 60.0)
    pool.done(begun)
    assert pool.heard(begun) == [("accepted", 100), "'text'"]


# -- limits --


def test_limits_count_from_the_start_of_the_body(pool: Pool, child: Child) -> None:
    job = pool.submit("a", soft_timeout=1.0, timeout=3.0)
    pool.dispatch()
    pool.inputs.expire(request.now() + 60.0)
    assert pool.heard(job) == []
    pool.accept(job)
    pool.inputs.expire(request.now() + 2.0)
    assert pool.heard(job)[1:] == [("soft limit", 1.0)]
    assert child.told[1:] == [(frames.Order.SOFT, job.number, 1.0)]
    pool.inputs.expire(request.now() + 4.0)
    assert pool.heard(job)[2:] == [("hard limit", 3.0)]
    assert child.stopped == [job.number]
    pool.inputs.expire(request.now() + 60.0)
    assert pool.stuck == [child]


@pytest.mark.parametrize(("limits", "left"), [({"timeout": 900.0}, 900.0), ({}, None)])
def test_what_begins_in_a_draining_child_has_its_time(
    pool: Pool, child: Child, limits: dict[str, float], left: float | None
) -> None:
    job = pool.submit("a", **limits)
    pool.dispatch()
    child.life.loaded(request.now())
    child.life.drain(request.now(), 0.0)
    pool.accept(job)
    deadline = child.life.deadline
    assert deadline == (None if left is None else pytest.approx(request.now() + left, abs=5.0))


def test_an_input_that_ended_reaches_no_limit(pool: Pool, child: Child) -> None:
    job = pool.start("a", soft_timeout=1.0, timeout=3.0)
    pool.done(job)
    pool.inputs.expire(request.now() + 60.0)
    assert pool.heard(job) == [("accepted", 100), "'text'"]
    assert len(child.told) == 1


# -- children that are gone --


def test_what_had_begun_is_lost_and_the_rest_starts_elsewhere_first() -> None:
    gone, other = Child(1), Child(2)
    pool = Pool(gone, other)
    begun = pool.start("a", gone, soft_timeout=1.0, timeout=2.0)
    sent = pool.submit("b")
    pool.dispatch(gone)
    pool.submit("c")
    pool.die(gone)
    assert pool.heard(begun) == [("accepted", 1), WorkerLostError]
    assert (gone.jobs, pool.inputs.in_flight()) == ({}, 0)
    pool.dispatch(other)
    assert other.runs == ["b", "c"]
    pool.accept(sent)
    pool.done(sent)
    assert pool.heard(sent) == [("accepted", 2), "'text'"]
    pool.inputs.expire(request.now() + 60.0)
    assert pool.heard(begun) == [("accepted", 1), WorkerLostError]


def test_what_had_not_begun_keeps_its_order_in_the_next_child(pool: Pool, child: Child) -> None:
    for one in "abc":
        pool.submit(one)
    pool.dispatch()
    pool.die(child)
    small, next_ = Child(), Child()
    small.room.take("embed")
    pool.dispatch(small)
    pool.dispatch(next_)
    assert (small.runs, next_.runs) == (["a"], ["b", "c"])


def test_what_a_child_had_answered_before_it_died_stays_answered(pool: Pool, child: Child) -> None:
    job = pool.start("a")
    job.terminate(15)
    pool.die(child)
    assert pool.heard(job) == [("accepted", 100), Terminated]


def test_a_worker_that_ends_leaves_what_had_not_begun_to_another(pool: Pool, child: Child) -> None:
    begun = pool.start("a")
    sent = pool.submit("b")
    pool.dispatch()
    pool.die(child, is_closing=True)
    assert pool.heard(begun)[1:] == [WorkerLostError]
    assert pool.heard(sent) == []
    assert pool.dispatch(Child()) == set()


def test_an_input_that_kills_before_it_is_seen_to_begin_is_lost_in_the_end() -> None:
    pool = Pool(max_deaths=3)
    job = pool.submit("a")
    for _ in range(3):
        child = Child()
        assert pool.dispatch(child)
        pool.die(child)
        assert pool.heard(job) == []
    child = Child()
    assert pool.dispatch(child)
    pool.die(child)
    assert pool.heard(job) == [("accepted", 100), WorkerLostError]
    assert pool.dispatch(Child()) == set()
