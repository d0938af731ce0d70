"""Inputs on their way through the pool where it is not the plain one: stops, limits, lost children.

After each of these tests the fixture checks that no input is held and that every slot is free.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gw_celery import errors
from tests.pool_harness import Harness, Order, Outcome, Report, Request, interrupted_move

StartPool = Callable[..., Harness]


def begun(harness: Harness, **options: object) -> Request:
    request = harness.submit(**options)  # type: ignore[arg-type]
    harness.child_of(request).accept(request)
    return request


def refilled(harness: Harness, number: int = 0) -> None:
    """The next child of a replica is there, and READY."""
    harness.advance(2.0)
    harness.child(number).ready()


def counts(harness: Harness, service: str = "work") -> tuple[float, ...]:
    """Workload that arrived, waits, runs, was served and was given back."""
    tallies = harness.info()["gw_tallies"]
    (name,) = [name for name in tallies if name.endswith(f".{service}")]
    names = ("arrived", "waiting", "running", "served", "given_back")
    return tuple(tallies[name][one] for one in names)


# -- from a queue to a child --


def test_a_child_gets_all_its_inputs_in_one_writing(harness: Harness) -> None:
    child = harness.child(0)
    harness.pool.hold(0)
    child.die(code=0)
    first, second = harness.submit(), harness.submit()
    harness.pool.restart(0)
    harness.advance(2.0)
    child = harness.child(0)
    writings: list[int] = []
    take = child._take
    child._take = lambda orders: writings.append(len(orders)) or take(orders)  # type: ignore[method-assign,func-returns-value]
    child.ready()
    assert child.runs == [first.id, second.id]
    assert 2 in writings
    for request in (first, second):
        child.done(request)


@pytest.mark.parametrize("kind", [Report.ACCEPT, Report.DONE, Report.GONE])
def test_a_report_of_what_the_child_does_not_hold_is_garbage(harness: Harness, kind: str) -> None:
    request = begun(harness)
    child = harness.child(0)
    child.done(request)
    rest = {Report.ACCEPT: [0.0], Report.DONE: ["'again'", 0.5], Report.GONE: []}[Report(kind)]
    child.report([kind, child._number(request), *rest])
    assert (child.exit_code, request.heard) == (-9, ["accepted", "done"])
    refilled(harness)


def test_an_input_that_its_child_has_dropped_is_lost(harness: Harness) -> None:
    request = begun(harness)
    harness.child(0).gone(request)
    assert request.heard == ["accepted", "WorkerLostError"]


def test_what_is_withdrawn_in_line_leaves_its_slot_to_the_next(start_pool: StartPool) -> None:
    harness = start_pool({"work": 1})
    running, withdrawn, last = (harness.submit() for _ in range(3))
    harness.revoke(withdrawn)
    child = harness.child(0)
    child.done(running)
    assert child.runs == [running.id, last.id]
    child.done(last)


def test_an_odd_time_limit_fails_its_input_and_nothing_arrives(harness: Harness) -> None:
    request = harness.submit(hard="soon")  # type: ignore[arg-type]
    assert request.heard == ["UsageError"]
    assert "has the time limit 'soon': send seconds" in str(request.answer)
    assert harness.child(0).runs == []
    assert harness.info()["gw_tallies"] == {}


def test_nothing_starts_while_results_cannot_be_stored(harness: Harness) -> None:
    child = harness.child(0)
    child.report([Report.OUTAGE, "Redis is away"])
    request = harness.submit()
    assert (child.runs, harness.info()["gw_outage"]) == ([], "Redis is away")
    child.report([Report.OUTAGE, ""])
    assert child.runs == [request.id]
    child.done(request)


def test_what_waits_for_a_service_can_be_given_to_other_workers_but_not_a_suspect(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1, "other": 1})
    begun(harness, task_id="killer")
    harness.child(0).die()
    suspect = harness.submit(task_id="killer", is_redelivered=True)
    waits, other = harness.submit(), harness.submit("other")
    requests = harness.pool.supervisor.requests
    requests.give_back(waits.handle.service)  # as where no replica wants inputs of it
    assert (waits.heard, suspect.heard, other.heard) == (["given back"], [], [])
    assert counts(harness) == (3, 1, 0, 0, 2)
    refilled(harness)
    child = harness.child(0)
    assert child.alone == ["killer"]
    for request in (suspect, other):
        child.done(request)


# -- stops --


def test_what_is_terminated_twice_is_answered_once(harness: Harness) -> None:
    request = begun(harness)
    for _ in range(2):
        harness.revoke(request, terminate=True)
    child = harness.child(0)
    assert (request.heard, child.stops) == (["accepted", "Terminated"], [request.id])
    child.gone(request)


def test_what_is_terminated_as_celery_hears_of_its_start_is_stopped_once(harness: Harness) -> None:
    request = harness.submit(soft=1.0, hard=2.0)
    request.on_heard = lambda what: what == "accepted" and harness.revoke(request, terminate=True)  # type: ignore[assignment,return-value]
    child = harness.child(0)
    child.accept(request)
    assert (request.heard, child.stops) == (["accepted", "Terminated"], [request.id])
    harness.advance(3.0)
    assert (request.heard, child.softs) == (["accepted", "Terminated"], [])
    child.gone(request)


def test_a_callback_that_submits_and_stops_others_finds_the_pool_in_accord(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1})
    request, waiting = harness.submit(), harness.submit()
    later: list[Request] = []

    def react(what: str) -> None:
        if what == "done":
            later.append(harness.submit())
            harness.revoke(waiting, terminate=True)

    request.on_heard = react
    child = harness.child(0)
    child.done(request)
    assert waiting.heard == ["accepted", "Terminated"]
    harness.poll()
    if waiting.id in child.runs:
        child.gone(waiting)
    assert child.runs[-1] == later[0].id
    child.done(later[0])


@pytest.mark.parametrize("step", [0, 1])
def test_a_signal_that_stops_an_input_in_the_middle_of_its_move_stops_it_after_that(
    harness: Harness, step: int
) -> None:
    request = harness.submit(hard=9.0)
    child = harness.child(0)
    # Celery's cold shutdown does it in the handler of SIGQUIT.
    with interrupted_move(step, lambda: request.handle.terminate(15)) as reached:
        child.accept(request)
    assert reached
    assert (request.heard, child.stops) == (["accepted", "Terminated"], [request.id])
    child.gone(request)
    harness.advance(60.0)
    assert child.is_alive


def test_what_is_terminated_as_celery_stores_that_another_is_revoked_ends_once(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1})
    running, revoked, other, last = (harness.submit() for _ in range(4))
    revoked.on_heard = lambda what: (
        revoked.handle.terminate(15),
        other.handle.terminate(15),
    )  # type: ignore[assignment,return-value]
    harness.revoke(revoked)
    child = harness.child(0)
    child.done(running)
    assert revoked.heard[0] == "revoked"
    assert other.heard == ["accepted", "Terminated"]
    assert child.runs == [running.id, last.id]
    child.done(last)


def test_a_child_that_stops_an_input_in_time_stays(start_pool: StartPool) -> None:
    harness = start_pool(cancel_timeout=5.0)
    request = begun(harness)
    harness.revoke(request, terminate=True)
    harness.advance(4.0)
    harness.child(0).gone(request)
    harness.advance(60.0)
    assert len(harness.children) == 1


def test_a_batch_that_begins_as_one_of_it_was_revoked_goes_without_it(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"batch": 2})
    revoked, other = harness.submit("batch"), harness.submit("batch")
    revoked.on_heard = lambda what: None
    from celery.worker import state

    state.revoked.add(revoked.id)  # and the loop has not turned since
    child = harness.child(0)
    child.accept(revoked)
    assert revoked.heard == ["revoked"]
    assert child.stops == [revoked.id]
    child.accept(other)
    child.gone(revoked)
    child.done(other)
    assert other.heard == ["accepted", "done"]


def test_what_expires_while_it_gathers_is_celerys_to_answer(start_pool: StartPool) -> None:
    harness = start_pool({"batch": 2})
    expired = harness.submit("batch")
    from celery.worker import state

    child = harness.child(0)
    state.revoked.add(expired.id)  # as Celery finds that it has expired
    child.report([Report.EXPIRED, child._number(expired)])
    assert expired.heard == ["revoked"]
    child.gone(expired)
    assert expired.heard == ["revoked"]


# -- children that are gone --


def test_what_had_not_begun_keeps_its_order_in_the_next_child(start_pool: StartPool) -> None:
    harness = start_pool({"work": 3})
    requests = [harness.submit() for _ in range(4)]
    harness.child(0).die()
    refilled(harness)
    child = harness.child(0)
    assert child.runs == [request.id for request in requests[:3]]
    for request in requests:
        child.done(request)


def test_what_was_answered_before_its_child_died_stays_answered(harness: Harness) -> None:
    request = begun(harness)
    harness.revoke(request, terminate=True)
    harness.child(0).die()
    assert request.heard == ["accepted", "Terminated"]
    refilled(harness)


def test_an_input_that_kills_before_it_is_seen_to_begin_is_lost_in_the_end(
    start_pool: StartPool,
) -> None:
    harness = start_pool(max_deaths=3)
    request = harness.submit()
    for _ in range(3):
        assert harness.child(0).runs == [request.id]
        harness.child(0).die()
        assert request.heard == []
        harness.advance(2.0)
        harness.child(0).ready()
        harness.advance(2.0)  # it was READY for long enough to be no failed start
    harness.child(0).die()
    assert request.heard == ["accepted", "WorkerLostError"]
    harness.advance(2.0)
    harness.child(0).ready()
    assert harness.child(0).runs == []


def test_a_drain_waits_for_what_has_no_limit_and_then_for_the_rest_no_longer(
    start_pool: StartPool, caplog: pytest.LogCaptureFixture
) -> None:
    harness = start_pool(drain_timeout=30.0)
    endless, unbegun = begun(harness), harness.submit()
    child = harness.child(0)
    harness.pool.shrink(3)
    harness.advance(1000.0)
    assert child.is_alive
    assert f"{endless.id}" in caplog.text, "the log names what keeps it"
    child.done(endless)
    harness.advance(28.0)
    assert child.is_alive
    harness.advance(4.0)
    assert child.exit_code == -9
    harness.pool.grow(3)
    harness.advance(2.0)
    harness.child(0).ready()
    assert harness.child(0).runs == [unbegun.id], "what never began starts elsewhere"
    harness.child(0).done(unbegun)


@pytest.mark.parametrize(("hard", "outlives"), [(900.0, True), (None, True), (1.0, False)])
def test_what_begins_in_a_draining_child_has_its_time(
    start_pool: StartPool, hard: float | None, outlives: bool
) -> None:
    harness = start_pool(drain_timeout=30.0, cancel_timeout=5.0)
    request = harness.submit(hard=hard)
    child = harness.child(0)
    harness.pool.hold(0)
    child.accept(request)
    harness.advance(60.0)
    assert child.is_alive is outlives
    if outlives:
        child.done(request)
        child.die(code=0)
    assert request.heard == ["accepted", "done" if outlives else "hard limit"]


def test_what_does_not_stop_keeps_no_draining_replica(
    start_pool: StartPool, caplog: pytest.LogCaptureFixture
) -> None:
    harness = start_pool(cancel_timeout=5.0, drain_timeout=30.0)
    stuck = begun(harness)
    child = harness.child(0)
    harness.pool.hold(0)
    harness.advance(28.0)
    harness.revoke(stuck, terminate=True)
    harness.advance(3.0)
    assert child.is_alive
    assert "no time limit" not in caplog.text, "it is being stopped"
    harness.advance(3.0)
    assert child.exit_code == -9


def test_a_cold_stop_leaves_what_has_not_begun_to_another_worker(start_pool: StartPool) -> None:
    harness = start_pool(cancel_timeout=2.0)
    running, sent = begun(harness, hard=0.3), harness.submit()
    child = harness.child(0)
    turns: list[int] = []

    def meanwhile() -> None:
        turns.append(1)
        if len(turns) == 5:
            child.accept(sent)
            child.done(sent)
            child.done(running)

    harness.stop(cold=True, meanwhile=meanwhile)
    assert sent.heard == [], "an accepted input is acknowledged, and would be lost"
    assert running.heard == ["accepted", "done"]


# -- how they count --


def test_an_input_arrives_waits_runs_and_is_served(start_pool: StartPool) -> None:
    harness = start_pool({"work": 1})
    request = harness.submit(headers={"gw-workload": 4.0})
    waiting = harness.submit()
    assert counts(harness) == (5, 1, 4, 0, 0)
    child = harness.child(0)
    child.accept(request)
    assert counts(harness) == (5, 1, 4, 0, 0)
    child.done(request)
    assert counts(harness) == (5, 0, 1, 4, 0)
    child.done(waiting)
    assert counts(harness) == (5, 0, 0, 5, 0)


@pytest.mark.parametrize("odd", [None, "much", -1.0, float("nan"), [3.0], True], ids=repr)
def test_a_message_with_an_odd_workload_counts_as_one(harness: Harness, odd: object) -> None:
    requests = [harness.submit(headers={"gw-workload": odd}), harness.submit()]
    assert counts(harness) == (2, 0, 2, 0, 0)
    for request in requests:
        harness.child(0).done(request)


@pytest.mark.parametrize(
    ("outcome", "requeue", "is_served"),
    [
        (Outcome.FAILURE, False, True),
        (Outcome.RETRY, False, True),
        (Outcome.IGNORE, False, True),
        (Outcome.REJECT, False, True),
        (Outcome.REJECT, True, False),
        (Outcome.UNSTORED, False, False),
    ],
)
def test_what_ran_to_its_end_is_served_unless_the_broker_gets_it_back(
    harness: Harness, outcome: str, requeue: bool, is_served: bool
) -> None:
    harness.child(0).error(begun(harness), outcome=outcome, requeue=requeue)
    assert counts(harness) == (1, 0, 0, int(is_served), int(not is_served))


def test_an_input_that_its_child_refused_is_counted_apart(harness: Harness) -> None:
    late = f"{errors.QueueTimeExceeded.__module__}.QueueTimeExceeded"
    for type_name in ("builtins.ValueError", late):
        harness.child(0).error(begun(harness), type_name=type_name)
    (tallied,) = harness.info()["gw_tallies"].values()
    assert (tallied["failed"], tallied["refused_inputs"]) == (2.0, 1)


def test_what_reaches_its_hard_limit_is_served_once(harness: Harness) -> None:
    request = begun(harness, hard=1.0)
    harness.advance(2.0)
    assert counts(harness) == (1, 0, 0, 1, 0)
    harness.child(0).gone(request)
    assert counts(harness) == (1, 0, 0, 1, 0)


def test_what_is_stopped_or_revoked_is_given_back_before_and_after_its_start(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1})
    running, stopped, revoked = begun(harness), harness.submit(), harness.submit()
    harness.revoke(running, terminate=True)
    harness.revoke(stopped, terminate=True)
    harness.revoke(revoked)
    assert counts(harness) == (3, 1, 0, 0, 2)
    harness.child(0).gone(running)
    assert counts(harness) == (3, 0, 0, 0, 3)


def test_what_a_lost_child_had_not_begun_waits_again_and_the_rest_is_given_back(
    harness: Harness,
) -> None:
    begun(harness)
    again = harness.submit()
    harness.child(0).die()
    assert counts(harness) == (2, 1, 0, 0, 1)
    refilled(harness)
    assert counts(harness) == (2, 0, 1, 0, 1)
    harness.child(0).done(again)


def test_what_is_forgotten_at_a_lost_connection_counts_again_when_it_comes_again(
    start_pool: StartPool,
) -> None:
    harness = start_pool({"work": 1})
    running, _ = begun(harness), harness.submit(task_id="waiting")
    harness.pool.flush()
    assert counts(harness) == (2, 0, 1, 0, 1)
    again = harness.submit(task_id="waiting", is_redelivered=True)
    assert counts(harness) == (3, 1, 1, 0, 1)
    for request in (running, again):
        harness.child(0).done(request)


def test_a_second_delivery_of_what_is_here_counts_nothing(harness: Harness) -> None:
    request = begun(harness, task_id="same")
    harness.submit(task_id="same", is_redelivered=True)
    harness.child(0).done(request)
    assert counts(harness) == (1, 0, 0, 1, 0)


def test_a_drained_replicas_order_is_the_last_that_it_gets(harness: Harness) -> None:
    harness.pool.hold(0)
    child = harness.child(0)
    assert [order[0] for order in child.orders] == [Order.DRAIN, Order.LEAVE]
    child.die(code=0)


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_a_replica_between_two_children_is_starting_and_has_not_failed(
    harness: Harness, how: str
) -> None:
    harness.advance(5.0)
    if how == "restarted":
        harness.pool.hold(0)
        harness.child(0).die(code=0)
        harness.pool.restart(0)
    else:
        begun(harness)
        harness.child(0).die()
    (replica,) = harness.pool.snapshot().replicas
    assert (replica.state, replica.pid) == ("starting", None)
    refilled(harness)


# -- children that must go, or are gone --


@pytest.mark.parametrize("bound", [{"maxtasksperchild": 2}, {"max_memory_per_child": 4}])
def test_a_worn_child_is_replaced_by_one_that_has_loaded(
    start_pool: StartPool, bound: dict[str, int]
) -> None:
    harness = start_pool(options=bound)
    worn = harness.child(0)
    worn.beat(resident_bytes=4096)
    worn.done(harness.submit())
    assert harness.child(0) is worn
    worn.beat(resident_bytes=4097)
    last = harness.submit()
    worn.done(last)
    successor = harness.child(0)
    assert (successor is worn, worn.is_draining) == (False, False)
    successor.ready()
    assert worn.is_leaving
    worn.die(code=0)


def test_where_no_second_copy_loads_a_child_that_must_go_drains_first(harness: Harness) -> None:
    request = begun(harness)
    child = harness.child(0)
    child.error(request, type_name="builtins.MemoryError")
    harness.child(0).fail_to_load("no memory for two copies")
    assert not child.is_draining
    harness.advance(1.0)
    assert child.is_draining
    child.die(code=0)
    harness.advance(2.0)
    harness.child(0).ready()


def test_a_child_that_was_never_well_blames_no_input(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=1)
    for delivery in range(3):
        request = begun(harness, task_id="innocent", is_redelivered=delivery > 0)
        (unfit,) = harness.pool.supervisor.children()
        unfit.is_unfit = True  # its liveness probe has never passed
        child = harness.child(0)
        child.die()
        assert (request.heard[-1], child.alone) == ("WorkerLostError", [])
        harness.advance(65.0)
        harness.child(0).ready()


def test_records_of_what_began_in_a_lost_child_are_removed_once_celery_has_answered(
    harness: Harness,
) -> None:
    request, _ = begun(harness), harness.submit()
    removed: list[tuple[list[int], list[str]]] = []
    harness.pool.cluster.lost = SimpleNamespace(
        forget=lambda numbers: removed.append((numbers, list(request.heard)))
    )
    harness.child(0).die()
    assert removed == [([request.handle.number], ["accepted", "WorkerLostError"])]
    refilled(harness)
    harness.child(0).done(harness.requests[1])
