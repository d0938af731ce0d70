from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import Terminated, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown

from gw_celery.pool import requests as request
from gw_celery.protocol import frames
from gw_celery.replica import tracer

CALLBACKS = ("accept_callback", "callback", "error_callback", "timeout_callback")
ARGS = ("proj.embed", "id-1", {"retries": 0}, b"body", "application/json", "utf-8")


class Celerys:
    """Stands for Celery's request: notes which callback is called with what."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.raises = raises

    def options(self, **limits: float) -> dict[str, Any]:
        return {name: self.noting(name) for name in CALLBACKS} | limits

    def noting(self, name: str) -> Callable[..., None]:
        def note(*args: Any) -> None:
            self.calls.append((name, args))
            if self.raises is not None:
                raise self.raises

        return note

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Pool:
    """Stands for the pool: notes what it is to stop."""

    def __init__(self) -> None:
        self.stopped: list[tuple[request.PoolRequest, int]] = []

    def stop(self, stopped: request.PoolRequest, signum: int) -> None:
        self.stopped.append((stopped, signum))


def made(celerys: Celerys, pool: Any = None, **limits: float) -> request.PoolRequest:
    return request.PoolRequest(7, ARGS, "embed", celerys.options(**limits), pool)


def error(outcome: frames.Outcome, *, requeue: bool = False) -> list[Any]:
    texts = ["proj.Oops", "Oops('x')", "x", "Traceback: x"]
    frame = frames.pack_reports([(frames.Report.ERROR, 7, outcome, *texts, requeue)])
    (report,) = frames.unpack_reports(frame[4:])
    return report


ANSWERS: dict[str, Callable[[request.PoolRequest], None]] = {
    "done": lambda handle: handle.tell_report([frames.Report.DONE, 7, "'text'", 0.5]),
    "error": lambda handle: handle.tell_report(error(frames.Outcome.FAILURE)),
    "internal error": lambda handle: handle.tell_report(error(frames.Outcome.INTERNAL)),
    "exit": lambda handle: handle.tell_report(error(frames.Outcome.EXIT)),
    "lost": lambda handle: handle.tell_lost("it died."),
    "terminated": lambda handle: handle.tell_broken(Terminated(15)),
    "hard limit": lambda handle: handle.tell_hard_limit(),
}
answers = pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)


def test_a_job_says_what_celerys_tracer_will_get() -> None:
    handle = made(Celerys())
    assert (handle.name, handle.task_id, handle.request) == ("proj.embed", "id-1", {"retries": 0})
    assert handle.args is ARGS


def test_an_answer_is_a_text_and_a_runtime() -> None:
    celerys = Celerys()
    handle = made(celerys)
    handle.tell_accepted(123, 4.5)
    handle.tell_report([frames.Report.DONE, 7, "'text'", 0.5])
    assert celerys.calls[1:] == [("callback", ((0, "'text'", 0.5),))]


@answers
@pytest.mark.parametrize("raised", [ValueError("receiver"), MemoryError(), OSError("backend")])
def test_a_callback_that_raises_is_logged_and_called_once(
    answer: Callable[[request.PoolRequest], None],
    raised: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    celerys = Celerys(raises=raised)
    handle = made(celerys, soft_timeout=1.0, timeout=3.0)
    handle.tell_accepted(123, 4.5)
    handle.tell_soft_limit()
    answer(handle)
    assert celerys.names[:2] == ["accept_callback", "timeout_callback"]
    assert len(celerys.calls) == 3
    assert [record.message for record in caplog.records] == [
        f"{name} of task proj.embed[id-1] raised; the worker goes on" for name in celerys.names
    ]


def test_a_shutdown_that_a_signal_raises_in_a_callback_reaches_the_worker() -> None:
    handle = made(Celerys(raises=WorkerShutdown(0)))
    with pytest.raises(WorkerShutdown):
        handle.tell_accepted(123, 4.5)


def test_a_job_without_callbacks_can_be_answered() -> None:
    handle = request.PoolRequest(7, ARGS, "embed", {}, None)
    handle.tell_accepted(1, 2.0)
    handle.tell_soft_limit()
    handle.tell_hard_limit()
    assert (handle.soft_limit, handle.hard_limit) == (None, None)


def test_a_hard_limit_calls_the_time_out_callback_and_nothing_else() -> None:
    celerys = Celerys()
    handle = made(celerys, timeout=3.0)
    handle.tell_accepted(123, 4.5)
    handle.tell_hard_limit()
    assert celerys.calls[1:] == [("timeout_callback", (False, 3.0))]


def test_a_soft_limit_is_told_and_the_input_goes_on() -> None:
    celerys = Celerys()
    handle = made(celerys, soft_timeout=1.5, timeout=3.0)
    handle.tell_accepted(123, 4.5)
    handle.tell_soft_limit()
    handle.tell_report([frames.Report.DONE, 7, "'partial'", 2.0])
    assert celerys.names == ["accept_callback", "timeout_callback", "callback"]
    assert celerys.calls[1][1] == (True, 1.5)


def test_terminate_stops_this_job_and_no_other() -> None:
    pool = Pool()
    handle = made(Celerys(), pool)
    handle.terminate(15)
    assert pool.stopped == [(handle, 15)]


def answered_error(act: Callable[[request.PoolRequest], None]) -> Any:
    celerys = Celerys()
    handle = made(celerys)
    act(handle)
    ((name, (einfo,)),) = celerys.calls
    assert name == "error_callback"
    return einfo


def test_a_lost_input_is_told_in_billiards_words_with_its_number() -> None:
    einfo = answered_error(
        lambda handle: handle.tell_lost("Worker exited prematurely: signal 9 (SIGKILL)")
    )
    assert isinstance(einfo.exception.exc, WorkerLostError)
    assert str(einfo.exception.exc) == ("Worker exited prematurely: signal 9 (SIGKILL) Job: 7.")


@pytest.mark.parametrize(
    ("act", "kind"),
    [(ANSWERS["lost"], WorkerLostError), (ANSWERS["terminated"], Terminated)],
)
def test_what_the_pool_itself_answers_has_a_traceback_and_can_be_pickled(
    act: Callable[[request.PoolRequest], None], kind: type[Exception]
) -> None:
    einfo = answered_error(act)
    assert einfo.type is kind
    assert kind.__name__ in einfo.traceback
    assert pickle.loads(pickle.dumps(einfo)).type is kind


def test_an_exit_in_a_body_loses_its_input_only() -> None:
    einfo = answered_error(lambda handle: handle.tell_report(error(frames.Outcome.EXIT)))
    assert isinstance(einfo.exception.exc, WorkerLostError)
    assert "Worker exited prematurely: Oops('x') Job: 7." in str(einfo.exception.exc)


def test_an_error_of_the_tracer_itself_is_no_answer_of_the_task() -> None:
    einfo = answered_error(lambda handle: handle.tell_report(error(frames.Outcome.INTERNAL)))
    assert einfo.type is request.Reported
    assert "Oops('x')" in repr(einfo.exception.exc)


def reported(outcome: frames.Outcome, *, requeue: bool = False) -> Any:
    celerys = Celerys()
    made(celerys).tell_report(error(outcome, requeue=requeue))
    ((name, ((failed, einfo, _),)),) = celerys.calls
    assert (name, failed) == ("callback", 1)
    assert (einfo.traceback, str(einfo)) == ("Traceback: x", "Traceback: x")
    return einfo.exception


def test_an_exception_of_the_task_is_told_in_its_own_words() -> None:
    exc = reported(frames.Outcome.FAILURE)
    assert repr(exc) == "Oops('x')"
    assert str(exc) == "proj.Oops: x"
    again = pickle.loads(pickle.dumps(exc))
    assert (repr(again), str(again), again.traceback) == (repr(exc), str(exc), exc.traceback)


def test_an_unknown_outcome_is_a_failure() -> None:
    celerys = Celerys()
    report = error(frames.Outcome.FAILURE)
    report[2] = "unheard of"
    made(celerys).tell_report(report)
    assert celerys.names == ["callback"]


def test_a_retry_travels_as_celerys_own_with_its_cause() -> None:
    exc = reported(frames.Outcome.RETRY)
    assert isinstance(exc, Retry)
    assert (str(exc), repr(exc.exc)) == ("x", "Oops('x')")


def test_an_ignored_task_travels_as_celerys_own() -> None:
    assert isinstance(reported(frames.Outcome.IGNORE), Ignore)


@pytest.mark.parametrize("requeue", [True, False])
def test_a_rejection_travels_as_celerys_own_with_its_wish(requeue: bool) -> None:
    exc = reported(frames.Outcome.REJECT, requeue=requeue)
    assert isinstance(exc, Reject)
    assert (exc.reason, exc.requeue) == ("x", requeue)


# -- twins: later deliveries of the same message --


@answers
def test_a_twin_is_answered_with_the_input_that_runs(
    answer: Callable[[request.PoolRequest], None],
) -> None:
    first, second = Celerys(), Celerys()
    running, twin = made(first, timeout=3.0), made(second, timeout=3.0)
    running.add_delivery(twin)
    running.tell_accepted(123, 4.5)
    answer(running)
    assert first.names == second.names
    assert len(second.calls) == 2
    assert second.calls[0] == ("accept_callback", (123, 4.5))


def test_a_twin_that_came_after_the_start_is_accepted_once() -> None:
    first, second = Celerys(), Celerys()
    running, twin = made(first), made(second)
    running.tell_accepted(123, 4.5)
    running.add_delivery(twin)
    running.tell_report([frames.Report.DONE, 7, "'text'", 0.5])
    assert second.names == ["accept_callback", "callback"]


def test_a_callback_that_raises_keeps_no_answer_from_the_twin() -> None:
    second = Celerys()
    running, twin = made(Celerys(raises=ValueError())), made(second)
    running.add_delivery(twin)
    running.tell_accepted(123, 4.5)
    running.tell_report([frames.Report.DONE, 7, "'text'", 0.5])
    assert second.names == ["accept_callback", "callback"]


def test_a_twin_joins_an_input_that_runs_as_accepted_and_is_stopped_with_it() -> None:
    first, second, pool = Celerys(), Celerys(), Pool()
    running, twin = made(first, pool), made(second, pool)
    running.tell_accepted(123, 4.5)
    running.add_delivery(twin)
    assert second.names == ["accept_callback"]
    twin.terminate(15)
    assert pool.stopped == [(running, 15)], "Celery knows the twin under the task's id"
    running.tell_broken(Terminated(15))
    assert second.names == ["accept_callback", "error_callback"]


@pytest.mark.parametrize(
    ("request_", "is_redelivered"),
    [
        ({}, False),
        ({"delivery_info": None}, False),
        ({"delivery_info": {"redelivered": False}}, False),
        ({"delivery_info": {"redelivered": True}}, True),
        ({"x-delivery-count": 2}, True),
    ],
)
def test_a_broker_says_that_it_delivers_again(
    request_: dict[str, Any], is_redelivered: bool
) -> None:
    handle = request.PoolRequest(7, ("n", "id-1", request_), "embed", {}, None)
    assert handle.is_redelivered is is_redelivered


# -- both sides --


def arrived(exc: BaseException) -> Any:
    """The exception of which Celery hears when a child's tracer ended with ``exc``."""
    celerys = Celerys()
    frame = frames.pack_reports([tracer.failure(7, exc, "")])
    (report,) = frames.unpack_reports(frame[4:])
    made(celerys).tell_report(report)
    ((_, ((_, einfo, _),)),) = celerys.calls
    return einfo.exception


def test_a_rejection_arrives_with_the_reason_that_was_given() -> None:
    assert arrived(Reject("no model", requeue=True)).reason == "no model"


def test_a_retry_arrives_with_its_cause() -> None:
    exc = arrived(Retry("later", ValueError("busy"), 3))
    assert str(exc) == "later"
    assert repr(exc.exc) == "ValueError('busy')"


def test_a_failure_arrives_with_its_class_and_text() -> None:
    exc = arrived(json.JSONDecodeError("bad", "doc", 0))
    assert str(exc) == "json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)"
