"""What Celery's own request makes of the callbacks of an input."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.worker import state
from celery.worker.request import Request
from kombu import Message, serialization

from gw_celery.pool import requests as pool_request
from gw_celery.protocol import frames

ID = "the request's"


def message_of(app: Celery, task: str) -> Message:
    """A message as a broker delivers it."""
    sent = app.amqp.as_task_v2(ID, task, (), {})
    content_type, content_encoding, body = serialization.dumps(sent.body, "json")
    return Message(
        body=body,
        headers=sent.headers,
        properties=sent.properties,
        content_type=content_type,
        content_encoding=content_encoding,
        accept={content_type},
    )


@pytest.fixture
def request_of(celery_app: Celery) -> Callable[..., tuple[Any, list[Any]]]:
    """Makes a request, and the list of what happens to it."""
    celery_app.backend.forget(ID)  # the memory backend is the process's

    def make(*, acks_late: bool = True) -> tuple[Any, list[Any]]:
        happened: list[Any] = []

        @celery_app.task(name="proj.embed", acks_late=acks_late, reject_on_worker_lost=True)
        def embed() -> None: ...

        class Eventer:
            enabled = True

            def send(self, kind: str, **fields: Any) -> None:
                happened.append((kind, fields.get("exception") or fields.get("result")))

        request = Request(
            message_of(celery_app, "proj.embed"),
            app=celery_app,
            task=embed,
            eventer=Eventer(),
            on_ack=lambda *_: happened.append("acked"),
            on_reject=lambda _, __, requeue: happened.append(("rejected", requeue)),
        )
        return request, happened

    return make


def report(
    handle: pool_request.PoolRequest, outcome: frames.Outcome, *, requeue: bool = False
) -> None:
    """Answer ``handle`` as a child's report of an exception does."""
    texts = ["proj.Oops", "Oops('x')", "x", "Traceback: x"]
    handle.tell_report([frames.Report.ERROR, 7, outcome, *texts, requeue])


def handle_of(request: Any) -> pool_request.PoolRequest:
    callbacks = (request.on_accepted, request.on_success, request.on_failure, request.on_timeout)
    names = ("accept_callback", "callback", "error_callback", "timeout_callback")
    options = dict(zip(names, callbacks, strict=True)) | {"timeout": 3.0}
    args = ("proj.embed", ID, {}, b"", "", "")
    pool: Any = None
    return pool_request.PoolRequest(7, args, "embed", options, pool)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            lambda handle: handle.tell_report([frames.Report.DONE, 7, "'text'", 0.5]),
            ["acked", ("task-succeeded", "'text'")],
        ),
        (
            lambda handle: report(handle, frames.Outcome.FAILURE),
            ["acked", ("task-failed", "Oops('x')")],
        ),
        (
            lambda handle: report(handle, frames.Outcome.RETRY),
            ["acked", ("task-retried", "Oops('x')")],
        ),
        (lambda handle: report(handle, frames.Outcome.IGNORE), ["acked"]),
        (
            lambda handle: report(handle, frames.Outcome.REJECT, requeue=True),
            [("rejected", True), ("task-rejected", None)],
        ),
    ],
    ids=["done", "error", "retry", "ignore", "reject"],
)
def test_celery_settles_the_message_as_for_its_own_pools(
    request_of: Any,
    answer: Callable[[pool_request.PoolRequest], None],
    expected: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    request, happened = request_of()
    handle = handle_of(request)
    handle.tell_accepted(123, time.monotonic())
    answer(handle)
    assert happened == [("task-started", None), *expected]
    assert "raised; the worker goes on" not in caplog.text


def test_celery_gives_a_lost_input_back_to_the_broker(request_of: Any) -> None:
    request, happened = request_of()
    handle = handle_of(request)
    handle.tell_accepted(123, time.monotonic())
    handle.tell_lost("Worker exited prematurely: signal 9 (SIGKILL)")
    assert ("rejected", True) in happened
    assert "acked" not in happened


@pytest.mark.parametrize("acks_late", [True, False])
def test_an_input_that_has_not_begun_is_given_to_another_worker(
    request_of: Any, acks_late: bool
) -> None:
    request, happened = request_of(acks_late=acks_late)
    state.task_reserved(request)
    handle = handle_of(request)
    assert handle.can_be_rejected
    handle.reject()
    assert happened == [("rejected", True), ("task-rejected", None)]
    assert request not in state.reserved_requests


def test_celery_fails_an_input_at_its_hard_limit_once(request_of: Any, celery_app: Celery) -> None:
    request, happened = request_of()
    handle = handle_of(request)
    handle.tell_accepted(123, time.monotonic())
    handle.tell_hard_limit()
    assert happened.count("acked") == 1
    assert [one[0] for one in happened if one != "acked"] == ["task-started", "task-failed"]
    assert celery_app.AsyncResult(ID).state == "FAILURE"


@pytest.fixture
def revoked() -> Iterator[None]:
    """The task is revoked after its message was taken."""
    state.revoked.add(ID)
    yield
    state.revoked.pop_value(ID)


@pytest.mark.usefixtures("revoked")
def test_an_input_that_is_revoked_while_it_waits_is_celerys_to_answer(
    request_of: Any, celery_app: Celery
) -> None:
    request, happened = request_of()
    handle = handle_of(request)
    assert handle.was_withdrawn()
    assert happened.count("acked") == 1
    assert celery_app.AsyncResult(ID).state == "REVOKED"


def test_an_input_that_is_not_revoked_runs(request_of: Any) -> None:
    request, happened = request_of()
    handle = handle_of(request)
    assert not handle.was_withdrawn()
    assert happened == []


def test_an_input_that_cannot_be_checked_runs(request_of: Any, caplog: Any) -> None:
    request, _ = request_of()
    request.revoked = raising(ConnectionError("backend"))
    handle = handle_of(request)
    assert not handle.was_withdrawn()
    assert f"task proj.embed[{ID}] could not be checked" in caplog.text


@pytest.mark.parametrize(("acks_late", "state_"), [(False, "FAILURE"), (True, "PENDING")])
def test_what_a_cold_shutdown_stops_fails_where_no_broker_has_it(
    request_of: Any, celery_app: Celery, acks_late: bool, state_: str
) -> None:
    request, _ = request_of(acks_late=acks_late)
    request._already_cancelled = True
    handle_of(request).fail_when_acknowledged_early()
    assert celery_app.AsyncResult(ID).state == state_


def test_a_result_backend_that_is_away_holds_up_no_cold_shutdown(
    request_of: Any,
    celery_app: Celery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request, _ = request_of(acks_late=False)
    request._already_cancelled = True
    monkeypatch.setattr(request.task.backend, "mark_as_failure", raising(ConnectionError("gone")))
    handle_of(request).fail_when_acknowledged_early()
    assert celery_app.AsyncResult(ID).state == "PENDING"
    assert f"proj.embed[{ID}] was running when its worker was shut down" in caplog.text


def raising(exc: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise exc

    return fail
