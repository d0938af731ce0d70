"""What Celery hears of an input, in its own words, and that nothing it raises ends the pool."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import Terminated, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown

from tests.pool_harness import Child, Harness, Outcome, Request

StartPool = Callable[..., Harness]
Answer = Callable[[Harness, Child, Request], None]

ANSWERS: dict[str, Answer] = {
    "done": lambda harness, child, request: child.done(request),
    "error": lambda harness, child, request: child.error(request),
    "internal error": lambda _, child, request: child.error(request, outcome=Outcome.INTERNAL),
    "lost": lambda harness, child, request: child.die(),
    "terminated": lambda harness, child, request: request.handle.terminate(15),
    "hard limit": lambda harness, child, request: harness.advance(9.0),
}
answers = pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)


@pytest.fixture
def harness(start_pool: StartPool) -> Harness:
    return start_pool(drain_timeout=1000.0, cancel_timeout=1000.0)


def begun(harness: Harness, **given: Any) -> tuple[Child, Request]:
    request = harness.submit(**given)
    child = harness.child(0)
    child.accept(request)
    return child, request


def let_go(child: Child, request: Request) -> None:
    """The child lets go of what it was told to stop."""
    if child.is_alive and request.id in child.stops:
        child.gone(request)


@answers
@pytest.mark.parametrize("raised", [ValueError("receiver"), MemoryError(), OSError("backend")])
def test_a_callback_that_raises_is_logged_and_called_once(
    harness: Harness, answer: Answer, raised: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    request = harness.submit(soft=1.0, hard=8.0)
    request.acknowledged, request.state = True, "FAILURE"

    def fail(what: str) -> None:
        raise raised

    request.on_heard = fail
    child = harness.child(0)
    child.accept(request)
    harness.advance(1.5)
    answer(harness, child, request)
    assert request.heard[:2] == ["accepted", "soft limit"]
    assert len(request.heard) == 3
    messages = [text for text in caplog.messages if "raised; the worker goes on" in text]
    assert len(messages) == 3
    assert all(f"[{request.id}]" in text for text in messages)
    let_go(child, request)


def test_a_shutdown_that_a_signal_raises_in_a_callback_reaches_the_worker(
    harness: Harness,
) -> None:
    request = harness.submit()

    def shut_down(what: str) -> None:
        request.on_heard = lambda what: None
        raise WorkerShutdown(0)

    request.on_heard = shut_down
    child = harness.child(0)
    with pytest.raises(WorkerShutdown):
        child.accept(request)
    child.done(request)


def test_an_answer_is_a_text_and_a_soft_limit_ends_nothing(harness: Harness) -> None:
    child, request = begun(harness, soft=1.5, hard=3.0)
    harness.advance(1.6)
    child.done(request, "'partial'")
    assert (request.heard, request.answer) == (["accepted", "soft limit", "done"], "'partial'")


def test_what_is_terminated_is_no_other(harness: Harness) -> None:
    child, first = begun(harness)
    _, second = begun(harness)
    second.handle.terminate(15)
    assert (first.heard, second.heard) == (["accepted"], ["accepted", "Terminated"])
    child.done(first)
    child.gone(second)


def test_a_lost_input_is_told_in_billiards_words_with_its_number(harness: Harness) -> None:
    child, request = begun(harness)
    child.die()
    assert isinstance(request.answer, WorkerLostError)
    number = request.handle.number
    assert str(request.answer) == (f"Worker exited prematurely: signal 9 (SIGKILL) Job: {number}.")


@pytest.mark.parametrize(("how", "kind"), [("lost", WorkerLostError), ("terminated", Terminated)])
def test_what_the_pool_itself_answers_has_a_traceback_and_can_be_pickled(
    harness: Harness, how: str, kind: type[Exception]
) -> None:
    child, request = begun(harness)
    ANSWERS[how](harness, child, request)
    assert request.einfo.type is kind
    assert kind.__name__ in request.einfo.traceback
    assert pickle.loads(pickle.dumps(request.einfo)).type is kind
    let_go(child, request)


def test_an_error_of_the_tracer_itself_is_no_answer_of_the_task(harness: Harness) -> None:
    child, request = begun(harness)
    child.error(request, "x", type_name="proj.Oops", outcome=Outcome.INTERNAL)
    assert request.heard == ["accepted", "Reported"]
    assert "proj.Oops('x')" in repr(request.answer)


def reported(harness: Harness, outcome: str, *, requeue: bool = False) -> Any:
    child, request = begun(harness)
    child.error(request, "x", type_name="proj.Oops", outcome=outcome, requeue=requeue)
    assert request.heard == ["accepted", "failed"]
    assert (request.answer.traceback, str(request.answer)) == ("Traceback: x", "Traceback: x")
    return request.answer.exception


def test_an_exception_of_the_task_is_told_in_its_own_words(harness: Harness) -> None:
    exc = reported(harness, Outcome.FAILURE)
    assert repr(exc) == "proj.Oops('x')"
    assert str(exc) == "proj.Oops: x"
    again = pickle.loads(pickle.dumps(exc))
    assert (repr(again), str(again), again.traceback) == (repr(exc), str(exc), exc.traceback)


def test_an_unknown_outcome_is_a_failure(harness: Harness) -> None:
    assert repr(reported(harness, "unheard of")) == "proj.Oops('x')"


def test_a_retry_travels_as_celerys_own_with_its_cause(harness: Harness) -> None:
    exc = reported(harness, Outcome.RETRY)
    assert isinstance(exc, Retry)
    assert (str(exc), repr(exc.exc)) == ("x", "proj.Oops('x')")


def test_an_ignored_task_travels_as_celerys_own(harness: Harness) -> None:
    assert isinstance(reported(harness, Outcome.IGNORE), Ignore)


@pytest.mark.parametrize("requeue", [True, False])
def test_a_rejection_travels_as_celerys_own_with_its_wish(
    harness: Harness, *, requeue: bool
) -> None:
    exc = reported(harness, Outcome.REJECT, requeue=requeue)
    assert isinstance(exc, Reject)
    assert (exc.reason, exc.requeue) == ("x", requeue)


# -- twins: later deliveries of the same message --


@answers
def test_a_twin_is_answered_with_the_input_that_runs(harness: Harness, answer: Answer) -> None:
    first = harness.submit(hard=8.0)
    twin = harness.submit(task_id=first.id, is_redelivered=True, hard=8.0)
    child = harness.child(0)
    child.accept(first)
    answer(harness, child, first)
    assert first.heard == twin.heard
    assert (len(twin.heard), twin.heard[0], twin.pid) == (2, "accepted", child.pid)
    let_go(child, first)


def test_a_twin_that_came_after_the_start_is_accepted_once(harness: Harness) -> None:
    child, first = begun(harness)
    twin = harness.submit(task_id=first.id, is_redelivered=True)
    assert twin.heard == ["accepted"]
    child.done(first)
    assert twin.heard == ["accepted", "done"]


def test_a_callback_that_raises_keeps_no_answer_from_the_twin(harness: Harness) -> None:
    first = harness.submit()
    first.acknowledged = True
    twin = harness.submit(task_id=first.id, is_redelivered=True)

    def fail(what: str) -> None:
        raise ValueError

    first.on_heard = fail
    child = harness.child(0)
    child.accept(first)
    child.done(first)
    assert twin.heard == ["accepted", "done"]


@pytest.mark.parametrize(
    ("headers", "is_redelivered"),
    [
        ({}, False),
        ({"delivery_info": None}, False),
        ({"delivery_info": {"redelivered": False}}, False),
        ({"delivery_info": {"redelivered": True}}, True),
        ({"x-delivery-count": 2}, True),
    ],
)
def test_a_broker_says_that_it_delivers_again(
    headers: dict[str, Any], *, is_redelivered: bool
) -> None:
    with Harness().running() as harness:
        harness.child(0).ready()
        harness.submit(task_id="twice")
        harness.submit(task_id="twice", headers=headers)
        assert harness.child(0).runs == ["twice"] * (1 if is_redelivered else 2)
