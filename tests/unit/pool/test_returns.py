"""Inputs whose answer cannot be stored: they go back to the broker, counted and with pauses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kombu.exceptions
import pytest
import redis.exceptions

from gw_celery import errors
from tests.pool_harness import Child, Harness, Outcome, Report, Request
from tests.unit.pool.test_deliveries import SlowRedis, after_its_answer
from tests.unit.pool.test_deliveries import redis as slow_redis  # noqa: F401

StartPool = Callable[..., Harness]
AWAY = (
    redis.exceptions.ConnectionError("away"),
    redis.exceptions.ReadOnlyError("replica"),
    kombu.exceptions.OperationalError("broker"),
    OSError("network"),
)


def delivered(harness: Harness, task_id: str = "a", **options: Any) -> Request:
    return harness.submit(task_id=task_id, is_redelivered=True, **options)


def unstored(harness: Harness, request: Request) -> None:
    child = harness.child(0)
    child.accept(request)
    child.error(request, "why", outcome=Outcome.UNSTORED)


def test_an_outcome_that_is_not_stored_returns_with_growing_pauses_until_it_is_given_up(
    start_pool: StartPool,
) -> None:
    harness, child = start_pool(max_deaths=4), None
    request = harness.submit(task_id="a")
    child = harness.child(0)
    for pause in (1.0, 2.0, 4.0):
        unstored(harness, request)
        assert request.heard == ["accepted", "WorkerLostError"]
        runs = list(child.runs)
        request = delivered(harness)
        harness.advance(pause - 0.5)
        assert child.runs == runs
        harness.advance(2.0)
        assert child.runs == [*runs, "a"]
    unstored(harness, request)
    assert request.heard == ["accepted", "PoisonedInput"]
    text = str(request.answer)
    assert "had no answer that could be stored, 4 times" in text
    assert "why" in text
    assert "replica died" not in text
    # Its user may send it again.
    again = harness.submit(task_id="a")
    child.done(again)
    assert again.heard == ["done"]


def test_an_answer_clears_the_returns(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=2)
    child = harness.child(0)
    for _ in range(3):
        request = harness.submit(task_id="a")
        unstored(harness, request)
        assert request.heard[-1] == "WorkerLostError"
        request = delivered(harness)
        harness.advance(2.0)
        child.done(request)


def test_what_returned_runs_beside_others(start_pool: StartPool) -> None:
    harness = start_pool()
    child = harness.child(0)
    unstored(harness, harness.submit(task_id="a"))
    returned = delivered(harness)
    harness.advance(2.0)
    other = harness.submit()
    assert (child.runs, child.alone) == (["a", "a", other.id], [])
    child.done(returned)
    child.done(other)


def test_returns_and_deaths_are_counted_together(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=2)
    unstored(harness, harness.submit(task_id="a"))
    for is_alone in (False, True):
        request = delivered(harness)
        harness.advance(3.0)
        child = harness.child(0)
        assert (child.alone == ["a"]) is is_alone
        child.accept(request)
        child.die()
        harness.advance(3.0)
        harness.child(0).ready()
    assert request.heard[-1] == "PoisonedInput"
    assert "stored, 1 times, and was running alone when its replica died, 1 times" in str(
        request.answer
    )


def test_returns_that_other_workers_saw_count(
    start_pool: StartPool,
    slow_redis: SlowRedis,  # noqa: F811
) -> None:
    slow_redis.counts["gw:deaths:a.returns"] = 2
    harness = start_pool(max_deaths=3)
    child = harness.child(0)
    request = delivered(harness)
    slow_redis.is_let.set()
    harness.advance(1.0)
    assert child.runs == []
    after_its_answer(harness, slow_redis, lambda: harness.advance(0.5) or child.runs)
    assert child.alone == []
    unstored(harness, request)
    assert request.heard[-1] == "PoisonedInput"


# -- callbacks of Celery that fail --


def end(harness: Harness, request: Request, how: str) -> None:
    child = harness.child(0)
    if how == "done":
        child.done(request)
    elif how == "hard limit":
        harness.advance(9.0)
        child.gone(request)
    else:
        child.error(request, outcome=how)


def begun(harness: Harness, raised: Exception, **options: Any) -> tuple[Child, Request]:
    """An input whose next callback raises."""
    request, child = harness.submit(**options), harness.child(0)
    child.accept(request)

    def refuse(what: str) -> None:
        raise raised

    request.on_heard = refuse
    return child, request


@pytest.mark.parametrize("raised", [KeyError("errbacks"), ValueError("too long")])
@pytest.mark.parametrize(
    ("how", "is_stored_here"),
    [("done", False), (Outcome.FAILURE, False), (Outcome.INTERNAL, True), ("hard limit", True)],
)
def test_what_celery_cannot_store_becomes_a_stored_failure_and_is_acknowledged(
    harness: Harness, how: str, is_stored_here: bool, raised: Exception
) -> None:
    _, request = begun(harness, raised, hard=8.0)
    end(harness, request, how)
    assert (request.heard[-1], request.heard.count("acknowledged")) == ("acknowledged", 1)
    assert [state for state, _ in request.stored] == ["FAILURE"] * is_stored_here
    for _, error in request.stored:
        assert isinstance(error, errors.OutcomeNotStored)
        assert type(raised).__name__ in str(error)


@pytest.mark.parametrize("how", ["done", "hard limit", Outcome.INTERNAL])
def test_what_fails_after_the_outcome_was_stored_runs_no_second_time(
    harness: Harness, how: str
) -> None:
    child, request = begun(harness, OSError("a hook of the task"), hard=8.0)
    request.state = "FAILURE"
    end(harness, request, how)
    heard = request.heard[:]
    assert heard[-1] == "acknowledged"
    harness.advance(100.0)
    assert (request.heard, request.stored, child.runs) == (heard, [], [request.id])


waiting = pytest.mark.parametrize("how", [Outcome.INTERNAL, "hard limit"])
outages = pytest.mark.parametrize(
    "raised", [KeyError("errbacks"), errors.ResultsUnavailable("away"), *AWAY]
)


@outages
@waiting
def test_what_an_outage_keeps_from_being_stored_is_answered_after_it(
    harness: Harness, how: str, raised: Exception
) -> None:
    _, request = begun(harness, raised, hard=8.0)
    request.store_error = AWAY[0]
    end(harness, request, how)
    request.on_heard = lambda what: None
    heard = request.heard[:]
    assert ("acknowledged" in heard, "given back" in heard) == (False, False)
    harness.advance(100.0)
    assert request.heard == [*heard, heard[-1]]


@outages
@waiting
def test_what_an_outage_keeps_from_being_stored_for_long_goes_back_and_counts(
    start_pool: StartPool, how: str, raised: Exception
) -> None:
    harness = start_pool(store_timeout=5.0)
    child, request = begun(harness, raised, hard=8.0, task_id="a")
    request.store_error = AWAY[0]
    end(harness, request, how)
    harness.advance(3.0)
    assert "given back" not in request.heard
    harness.advance(4.0)
    assert request.heard[-1] == "given back"
    assert not request.acknowledged
    again = delivered(harness)
    harness.advance(0.5)
    assert child.runs == ["a"]
    harness.advance(1.0)
    assert child.runs == ["a", "a"]
    child.done(again)


def test_an_outcome_that_an_outage_keeps_from_being_stored_returns_once(
    start_pool: StartPool,
) -> None:
    harness = start_pool(store_timeout=5.0, max_deaths=2)
    child, request = harness.child(0), harness.submit(task_id="a")
    child.report([Report.OUTAGE, "away"])
    unstored(harness, request)
    harness.advance(7.0)
    assert request.heard == ["accepted", "given back"]
    child.report([Report.OUTAGE, ""])
    request = delivered(harness)
    harness.advance(2.0)
    assert child.runs == ["a", "a"]
    child.done(request)


def test_what_a_child_drops_unanswered_returns_counted(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=2)
    child, request = harness.child(0), harness.submit(task_id="a")
    child.accept(request)
    child.gone(request)
    assert request.heard == ["accepted", "WorkerLostError"]
    request = delivered(harness)
    harness.advance(0.5)
    assert child.runs == ["a"]
    harness.advance(1.0)
    child.accept(request)
    child.gone(request)
    assert request.heard == ["accepted", "PoisonedInput"]


def test_what_another_worker_has_now_is_dropped_with_its_counts_kept(
    start_pool: StartPool,
) -> None:
    harness = start_pool(max_deaths=2)
    child, request = harness.child(0), harness.submit(task_id="a")
    unstored(harness, request)
    request = delivered(harness)
    harness.advance(2.0)
    child.error(request, outcome=Outcome.FENCED)
    assert request.heard == ["given back"]
    request = delivered(harness)
    harness.advance(2.0)
    unstored(harness, request)
    assert request.heard[-1] == "PoisonedInput"


@pytest.mark.parametrize("is_stored_here", [True, False])
def test_what_is_answered_after_the_worker_was_declared_lost_is_not_acknowledged(
    harness: Harness, is_stored_here: bool
) -> None:
    lost = errors.DeclaredLost("a", "w.0/1")
    _, request = begun(harness, lost if is_stored_here else KeyError("errbacks"))
    request.store_error = lost
    end(harness, request, Outcome.INTERNAL)
    assert (request.heard[-1], request.acknowledged) == ("given back", False)


def test_a_message_whose_answer_waits_is_still_held(harness: Harness) -> None:
    properties = {"delivery_tag": "w.0/7"}
    _, request = begun(harness, AWAY[0], headers={"properties": properties})
    in_use = harness.pool.cluster.holds.in_use
    assert in_use() == ["w.0/7"]
    end(harness, request, Outcome.INTERNAL)
    assert in_use() == ["w.0/7"]
    request.on_heard = lambda what: None
    harness.advance(2.0)
    assert in_use() == []


@pytest.mark.parametrize(
    ("raised", "pause"),
    [(errors.ResultsUnavailable("away"), 1.0), (errors.DeclaredLost("a", "w.0/1"), 0.0)],
)
def test_what_must_not_run_and_cannot_be_withdrawn_goes_back(
    harness: Harness, raised: Exception, pause: float
) -> None:
    first, second = harness.submit(), harness.submit()
    request, child = harness.submit(task_id="a"), harness.child(0)
    harness.revoke(request)
    request.on_heard = lambda what: _raise(raised)
    child.done(first)
    assert request.heard == ["revoked", "given back"]
    assert child.runs == [first.id, second.id]
    child.done(second)
    again = delivered(harness)
    harness.advance(0.5)
    assert again.heard == ([] if pause else ["revoked"])
    harness.advance(pause)
    assert again.heard == ["revoked"]


def test_a_backend_that_refuses_everything_ends_nothing_and_loops_nothing(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    _, request = begun(harness, KeyError("errbacks"))
    request.store_error = redis.exceptions.ResponseError("WRONGTYPE")
    end(harness, request, Outcome.INTERNAL)
    assert request.heard[-1] == "acknowledged"
    assert "has no stored outcome" in caplog.text


def test_what_is_given_up_in_an_outage_comes_back_and_does_not_run(start_pool: StartPool) -> None:
    harness = start_pool(max_deaths=1, store_timeout=5.0)
    child, request = begun(harness, AWAY[0])
    child.error(request, outcome=Outcome.UNSTORED)
    assert set(request.heard) == {"accepted", "PoisonedInput"}
    harness.advance(7.0)
    assert request.heard[-1] == "given back"
    for pause in (1.0, 2.0):
        request = delivered(harness, request.id)
        request.on_heard = lambda what: _raise(AWAY[0])
        harness.advance(pause - 0.5)
        assert request.heard == []
        harness.advance(8.0)
        assert set(request.heard[:-1]) == {"PoisonedInput"}
        assert request.heard[-1] == "given back"
    request = delivered(harness, request.id)
    harness.advance(20.0)
    assert request.heard == ["PoisonedInput"]
    assert child.runs == [request.id]


def _raise(exc: Exception) -> None:
    raise exc
