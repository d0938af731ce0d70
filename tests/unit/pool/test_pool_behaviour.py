"""What the pool does with inputs and children, seen from Celery and from the children.

After each of these tests the fixture checks that no input is held and that every slot is free.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from billiard.exceptions import Terminated, WorkerLostError

from gw_celery import errors
from tests.pool_harness import Child, Harness, Outcome, Request

StartPool = Callable[..., Harness]


def running(harness: Harness, **options: object) -> tuple[Request, Child]:
    """An input whose body has started, and the child that it runs in."""
    request = harness.submit(**options)  # type: ignore[arg-type]
    child = harness.child_of(request)
    child.accept(request)
    return request, child


# -- the way of an input --


def test_an_input_is_accepted_and_answered_once(harness: Harness) -> None:
    request = harness.submit()
    child = harness.child(0)
    assert (child.runs, request.heard) == ([request.id], [])
    child.accept(request)
    assert (request.heard, request.pid) == (["accepted"], child.pid)
    child.done(request, "'answer'")
    assert (request.heard, request.answer) == (["accepted", "done"], "'answer'")


def test_a_start_that_is_reported_twice_is_told_once(harness: Harness) -> None:
    request, child = running(harness)
    child.accept(request)
    child.done(request)
    assert request.heard == ["accepted", "done"]


def test_nothing_is_sent_before_a_child_is_ready() -> None:
    with Harness().running() as harness:
        request = harness.submit()
        assert harness.child(0).runs == []
        harness.child(0).ready()
        assert harness.child(0).runs == [request.id]


def test_an_input_goes_to_the_child_that_holds_the_fewest(start_pool: StartPool) -> None:
    harness = start_pool({"work": 4}, replicas=3)
    requests = [harness.submit() for _ in range(6)]
    assert [len(harness.child(number).runs) for number in range(3)] == [2, 2, 2]
    idle = harness.child(1)
    for request in requests:
        if request.id in idle.runs:
            idle.done(request)
    later = harness.submit()
    assert later.id in idle.runs
    for request in {*requests, later}:
        if "done" not in request.heard:
            harness.child_of(request).done(request)


def test_an_input_over_the_slots_waits_for_one_and_the_first_comes_first(harness: Harness) -> None:
    first, second, third, fourth = (harness.submit() for _ in range(4))
    child = harness.child(0)
    assert child.runs == [first.id, second.id]
    child.done(second)
    assert child.runs == [first.id, second.id, third.id]
    child.error(first)
    assert child.runs[3:] == [fourth.id]
    for request in (third, fourth):
        child.done(request)


def test_each_service_has_slots_of_its_own(start_pool: StartPool) -> None:
    harness = start_pool({"work": 1, "other": 1})
    requests = [harness.submit(one) for one in ("work", "work", "other", "plain", "plain")]
    child = harness.child(0)
    assert child.runs == [requests[number].id for number in (0, 2, 3)]
    for request in (*requests[:1], *requests[2:4], requests[1], requests[4]):
        child.done(request)


@pytest.mark.parametrize(
    ("outcome", "heard"),
    [
        (Outcome.FAILURE, "failed"),
        (Outcome.RETRY, "failed"),
        (Outcome.UNSTORED, "WorkerLostError"),
    ],
)
def test_an_input_without_a_result_frees_its_slot(
    harness: Harness, outcome: str, heard: str
) -> None:
    request, child = running(harness)
    child.error(request, outcome=outcome)
    assert request.heard == ["accepted", heard]


def test_a_callback_of_celery_that_raises_ends_nothing(harness: Harness) -> None:
    request, other = harness.submit(), harness.submit()
    child = harness.child(0)

    def refuse(what: str) -> None:
        raise OSError(f"a receiver cannot take {what!r}")

    request.on_heard = refuse
    for one in (request, other):
        child.accept(one)
        child.done(one)
    assert request.heard == ["accepted", "done", "acknowledged"]
    assert other.heard == ["accepted", "done"]


# -- children that end --


def test_what_had_not_begun_runs_elsewhere_and_celery_hears_nothing_of_it(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1}, replicas=2)
    request, other = harness.submit(), harness.submit()
    waiting = harness.submit()
    harness.child_of(request).die()
    survivor = harness.child_of(other)
    assert request.heard == []
    survivor.done(other)
    assert survivor.runs == [other.id, request.id], "it is the first in line"
    survivor.accept(request)
    survivor.done(request)
    survivor.done(waiting)
    assert request.heard == ["accepted", "done"]
    harness.advance(2.0)
    harness.child(0).ready()


def test_what_had_begun_is_lost_with_its_child(harness: Harness) -> None:
    request, child = running(harness)
    child.die()
    assert request.heard == ["accepted", "WorkerLostError"]
    assert isinstance(request.answer, WorkerLostError)
    assert "Worker exited prematurely: signal 9 (SIGKILL) Job: " in str(request.answer)
    harness.advance(2.0)
    assert harness.child(0) is not child
    harness.child(0).ready()


def test_what_a_child_wrote_before_it_died_counts(harness: Harness) -> None:
    request, child = running(harness)
    child.done(request)
    child.die()
    assert request.heard == ["accepted", "done"]
    harness.advance(2.0)
    harness.child(0).ready()


def test_a_child_that_writes_garbage_is_killed(harness: Harness) -> None:
    request, child = running(harness)
    child.garbage()
    assert (child.exit_code, request.heard) == (-9, ["accepted", "WorkerLostError"])
    harness.advance(2.0)
    harness.child(0).ready()


def test_a_child_that_hangs_is_killed(start_pool: StartPool) -> None:
    harness = start_pool(heartbeat_timeout=5.0)
    request, child = running(harness)
    harness.advance(60.0)
    child.hangs = True
    harness.advance(4.0)
    assert child.is_alive
    harness.advance(2.0)
    assert (child.exit_code, request.heard) == (-9, ["accepted", "WorkerLostError"])
    assert "sent no heartbeat" in str(request.answer)
    harness.advance(2.0)
    harness.child(0).ready()


def test_a_child_that_cannot_load_is_started_again_later_and_later() -> None:
    with Harness().running() as harness:
        waits = []
        for _ in range(4):
            before, failed_at = len(harness.children), harness.now
            harness.child(0).fail_to_load("no such model")
            while len(harness.children) == before:
                assert harness.now < failed_at + 60.0
                harness.advance(0.5)
            waits.append(round(harness.now - failed_at))
        assert waits == [1, 2, 4, 8]
        harness.child(0).fail_to_load("no such model")
        replica = harness.replica(0)
        assert (replica["state"], replica["last_error"]) == ("failed", "no such model")


def test_an_input_that_kills_is_given_up_after_three_deaths_alone(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=3)
    heard = []
    for delivery in range(4):
        request = harness.submit(task_id="killer", is_redelivered=delivery > 0)
        other = None if delivery == 0 else harness.submit()
        child = harness.child(0)
        assert child.runs[-1] == "killer", "beside it, nothing else runs"
        assert child.alone == (["killer"] if delivery else [])
        child.accept(request)
        child.die()
        heard.append(request.heard[-1])
        harness.advance(2.0)
        harness.child(0).ready()
        if other is not None:
            harness.child(0).done(other)
    assert heard == ["WorkerLostError", "WorkerLostError", "WorkerLostError", "PoisonedInput"]
    assert isinstance(request.answer, errors.PoisonedInput)
    assert len(harness.children) == 5


def test_a_suspect_waits_until_its_child_holds_nothing_and_others_wait_for_it(
    harness: Harness,
) -> None:
    request, child = running(harness, task_id="unlucky")
    child.die()
    harness.advance(2.0)
    child = harness.child(0)
    child.ready()
    before = harness.submit()
    suspect = harness.submit(task_id="unlucky", is_redelivered=True)
    after = harness.submit()
    assert child.runs == [before.id], "the child is kept free for the suspect"
    child.done(before)
    assert (child.runs, child.alone) == ([before.id, suspect.id], [suspect.id])
    child.done(suspect)
    assert child.runs[2:] == [after.id]
    child.done(after)
    assert request.heard == ["accepted", "WorkerLostError"]


def test_an_input_that_survived_alone_is_no_suspect_any_more(harness: Harness) -> None:
    request, child = running(harness, task_id="unlucky")
    child.die()
    assert request.heard[-1] == "WorkerLostError"
    harness.advance(2.0)
    child = harness.child(0)
    child.ready()
    child.done(harness.submit(task_id="unlucky", is_redelivered=True))
    later = harness.submit(task_id="unlucky", is_redelivered=True)
    assert (child.runs, child.alone) == (["unlucky", "unlucky"], ["unlucky"])
    child.done(later)


# -- revocations --


def test_an_input_that_is_revoked_while_it_waits_never_runs(harness: Harness) -> None:
    held = [harness.submit(), harness.submit()]
    revoked, last = harness.submit(), harness.submit()
    harness.revoke(revoked)
    child = harness.child(0)
    for request in held:
        child.done(request)
    assert revoked.heard == ["revoked"]
    assert child.runs == [*(one.id for one in held), last.id]
    child.done(last)


def test_an_input_that_is_terminated_while_it_waits_never_runs(harness: Harness) -> None:
    held = [harness.submit(), harness.submit()]
    stopped = harness.submit()
    harness.revoke(stopped, terminate=True)
    assert stopped.heard == ["accepted", "Terminated"]
    for request in held:
        harness.child(0).done(request)
    assert harness.child(0).runs == [one.id for one in held]


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_input_that_is_terminated_is_answered_once_and_a_late_report_dropped(
    harness: Harness, has_begun: bool
) -> None:
    request, other = harness.submit(), harness.submit()
    waiting = harness.submit()
    child = harness.child(0)
    if has_begun:
        child.accept(request)
    harness.revoke(request, terminate=True)
    assert request.heard == ["accepted", "Terminated"]
    assert isinstance(request.answer, Terminated)
    assert child.stops == [request.id]
    assert waiting.id not in child.runs, "the body may still hold the slot"
    child.done(request)
    assert waiting.id in child.runs
    assert request.heard == ["accepted", "Terminated"]
    child.done(other)
    child.done(waiting)


def test_an_input_that_is_revoked_while_it_gathers_is_stopped_in_its_child(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"batch": 2})
    request = harness.submit("batch")
    harness.revoke(request)
    child = harness.child(0)
    assert (request.heard, child.stops) == (["revoked"], [request.id])
    child.gone(request)


# -- time limits --


def test_a_soft_limit_counts_from_the_start_and_answers_nothing(harness: Harness) -> None:
    request = harness.submit(soft=1.0, hard=30.0)
    child = harness.child(0)
    harness.advance(5.0)
    assert child.softs == []
    child.accept(request)
    harness.advance(1.5)
    assert (request.heard, child.softs) == (["accepted", "soft limit"], [request.id])
    child.error(request)
    harness.advance(60.0)
    assert request.heard == ["accepted", "soft limit", "failed"]


def test_a_hard_limit_answers_at_once_and_a_late_report_is_dropped(harness: Harness) -> None:
    request, child = running(harness, hard=1.0)
    harness.advance(0.5)
    assert request.heard == ["accepted"]
    harness.advance(0.6)
    assert (request.heard, child.stops) == (["accepted", "hard limit"], [request.id])
    child.done(request)
    harness.advance(60.0)
    assert request.heard == ["accepted", "hard limit"]
    assert child.is_alive


def test_a_child_that_keeps_what_was_stopped_is_replaced_by_one_that_has_loaded(
    start_pool: StartPool,
) -> None:
    harness = start_pool(cancel_timeout=2.0)
    request, child = running(harness, hard=1.0)
    other = harness.submit()
    child.accept(other)
    harness.advance(4.0)
    successor = harness.child(0)
    assert successor is not child
    assert not child.is_draining, "it serves until the other can"
    successor.ready()
    assert child.is_draining
    child.done(other)
    harness.advance(2.0)
    assert not child.is_alive
    assert (request.heard, other.heard) == (["accepted", "hard limit"], ["accepted", "done"])


# -- the broker and the end --


def test_what_has_not_begun_is_forgotten_when_the_broker_is_lost(start_pool: StartPool) -> None:
    harness = start_pool({"work": 1, "batch": 2})
    begun, waiting, gathering = (harness.submit(one) for one in ("work", "work", "batch"))
    child = harness.child(0)
    child.accept(begun)
    harness.pool.flush()
    child.done(begun)
    assert begun.heard == ["accepted", "done"]
    assert child.stops == [gathering.id]
    child.gone(gathering)
    assert child.runs == [begun.id, gathering.id], "the broker delivers the rest again"
    assert (waiting.heard, gathering.heard) == ([], [])


def test_an_input_that_is_delivered_again_while_it_runs_is_run_once_and_answered_twice(
    harness: Harness,
) -> None:
    first, child = running(harness, task_id="same")
    twin = harness.submit(task_id="same", is_redelivered=True)
    retried = harness.submit(task_id="same", is_redelivered=True, retries=1)
    assert twin.heard == ["accepted"]
    assert child.runs == ["same", "same"], "a retry is another input"
    child.done(retried)
    assert retried.heard == ["done"]
    child.done(first)
    assert first.heard == twin.heard == ["accepted", "done"]


def test_a_drained_replica_finishes_and_stays_stopped_until_it_is_restarted(
    harness: Harness,
) -> None:
    request, child = running(harness)
    harness.pool.hold(0)
    waiting = harness.submit()
    assert (child.is_draining, child.is_leaving) == (True, False)
    child.done(request)
    assert child.is_leaving
    child.die(code=0)
    assert harness.replica(0)["state"] == "stopped"
    assert len(harness.children) == 1
    harness.pool.restart(0)
    harness.advance(2.0)
    harness.child(0).ready()
    assert harness.child(0).runs == [waiting.id]
    harness.child(0).done(waiting)


def test_what_a_child_wrote_before_it_ended_counts_though_its_end_is_seen_first(
    harness: Harness,
) -> None:
    request, child = running(harness)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "poll", lambda: None)  # the loop is busy meanwhile
        child.done(request)
        child.die()
        harness.pool.maintain_pool()
    assert request.heard == ["accepted", "done"]


def test_a_drain_has_time_for_the_longest_limit_though_that_input_was_stopped(
    harness: Harness,
) -> None:
    request = harness.submit(hard=100)
    child = harness.child_of(request)
    child.accept(request)
    harness.pool.hold(0)
    harness.advance(60.0)
    harness.revoke(request, terminate=True)
    harness.advance(2.0)
    assert child.is_alive, "it may clean up for gw_cancel_timeout, and leave"
    child.gone(request)
    assert child.is_leaving


def test_a_successor_that_loaded_before_a_restart_is_restarted_though_its_predecessor_ends(
    harness: Harness,
) -> None:
    """It may have older code or weights."""
    child = harness.child(0)
    child.report(["stuck", "work"])
    harness.advance(1.0)
    successor = harness.child(0)
    harness.pool.restart()
    child.die()
    harness.advance(2.0)
    successor.ready()
    harness.advance(3.0)
    assert successor.is_draining
    successor.die(code=0)
    harness.advance(2.0)
    harness.child(0).ready()
    harness.advance(5.0)
    assert not harness.child(0).is_draining, "once is enough"


def test_a_pool_grows_by_whole_replicas_and_shrinks_without_a_loss(harness: Harness) -> None:
    request, child = running(harness)
    harness.pool.grow(3)
    harness.advance(1.0)
    added = harness.child(1)
    added.ready()
    harness.pool.shrink(3)
    harness.advance(1.0)
    assert (added.is_leaving, child.is_draining) == (True, False), "the idle one goes"
    added.die(code=0)
    child.done(request)
    assert harness.pool.num_processes == 3


def test_a_warm_stop_waits_for_what_runs_and_lets_the_children_leave(harness: Harness) -> None:
    request, child = running(harness)
    other, _ = running(harness)
    waiting = [harness.submit(), harness.submit()]
    turns = []

    def meanwhile() -> None:
        turns.append(child.is_leaving)
        if len(turns) in (10, 20):
            child.done(request if len(turns) == 10 else other)

    harness.stop(meanwhile=meanwhile)
    assert request.heard == other.heard == ["accepted", "done"]
    assert [one.heard for one in waiting] == [["given back"]] * 2
    assert child.runs == [request.id, other.id]
    assert not any(turns[:20])
    assert child.exit_code == 0


def test_a_cold_stop_kills_what_does_not_end_in_time(start_pool: StartPool) -> None:
    harness = start_pool(cancel_timeout=1.0)
    request, child = running(harness)
    child.hangs = True
    before = harness.now
    harness.stop(cold=True)
    assert (child.exit_code, request.heard) == (-9, ["accepted", "given back"])
    assert harness.now - before < 10.0


def test_a_warm_stop_kills_what_runs_for_longer_than_it_may(start_pool: StartPool) -> None:
    harness = start_pool(shutdown_timeout=2.0, cancel_timeout=1.0)
    request, child = running(harness)
    before = harness.now
    harness.stop()
    assert (child.exit_code, request.heard) == (-9, ["accepted", "given back"])
    assert 2.0 < harness.now - before < 5.0


def test_a_warm_stop_at_its_deadline_lets_an_idle_child_leave(start_pool: StartPool) -> None:
    harness = start_pool({"work": 1}, replicas=2, shutdown_timeout=1.0, cancel_timeout=1.0)
    request, child = running(harness)
    (idle,) = {harness.child(0), harness.child(1)} - {child}
    harness.stop()
    assert request.heard == ["accepted", "given back"]
    assert (child.exit_code, idle.exit_code) == (-9, 0), "it runs its exit hooks"


def test_a_warm_stop_gives_back_at_once_what_has_not_begun(start_pool: StartPool) -> None:
    harness = start_pool({"work": 1, "batch": 2})
    begun, waiting, *gathering = map(harness.submit, ("work", "work", "batch", "batch"))
    child = harness.child(0)
    child.accept(begun)
    turns: list[list[list[str]]] = []

    def meanwhile() -> None:
        if not turns:  # the first may begin before it reads the order to drop it
            child.accept(gathering[0])
            child.gone(gathering[1])
        turns.append([request.heard[:] for request in (waiting, *gathering)])
        if len(turns) == 5:
            child.done(begun)
            child.done(gathering[0])

    harness.stop(meanwhile=meanwhile)
    assert turns[1] == [["given back"], ["accepted"], ["given back"]]
    assert (begun.heard, gathering[0].heard) == (["accepted", "done"],) * 2


@pytest.mark.parametrize("how", ["checked", "late", "returned by a dead child"])
def test_what_comes_to_a_pool_that_stops_is_given_back(start_pool: StartPool, how: str) -> None:
    harness = start_pool({"work": 1, "batch": 1})
    begun, child = running(harness)
    sent = harness.submit("batch") if how == "returned by a dead child" else None
    turns = 0

    def meanwhile() -> None:
        nonlocal turns, sent
        turns += 1
        if turns == 2:
            sent = sent or harness.submit(is_redelivered=how == "checked")
            child.die() if how == "returned by a dead child" else child.done(begun)

    harness.stop(meanwhile=meanwhile)
    assert sent is not None
    assert sent.heard == ["given back"]
