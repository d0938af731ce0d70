"""What Celery's own request makes of what the pool tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import request as celery_request
from celery.worker import state
from celery.worker.request import Request
from kombu import Message, serialization

import gw_celery as gw
from tests.pool_harness import Child, Harness, Outcome

StartPool = Callable[..., Harness]
ID = "the request's"


class Delivered:
    """A message as a broker delivers it, as Celery's consumer gives it to the pool."""

    def __init__(
        self, harness: Harness, *, ending: str = ".plain", acks_late: bool = True, **options: Any
    ) -> None:
        #: What happened to the message, and the events, in order.
        self.happened: list[Any] = []
        self.id, self.retries = ID, 0
        app = harness.app
        app.backend.forget(ID)  # the memory backend is the process's
        name = next(name for name in app.tasks if name.endswith(ending))
        task = app.tasks[name]
        task.acks_late, task.reject_on_worker_lost = acks_late, True
        sent = app.amqp.as_task_v2(ID, name, (), {})
        content_type, content_encoding, body = serialization.dumps(sent.body, "json")
        message = Message(
            body=body,
            headers=sent.headers,
            properties={**sent.properties, "delivery_info": {}},
            content_type=content_type,
            content_encoding=content_encoding,
            accept={content_type},
        )
        self.request: Any = Request(
            message,
            app=app,
            task=task,
            eventer=SimpleNamespace(enabled=True, send=self._send),
            on_ack=lambda *_: self.happened.append("acked"),
            on_reject=lambda _, __, requeue: self.happened.append(("rejected", requeue)),
        )
        for name, value in options.items():
            setattr(self.request, name, value)
        state.task_reserved(self.request)
        self.request.execute_using_pool(harness.pool)
        harness.poll()

    def _send(self, kind: str, **fields: Any) -> None:
        self.happened.append((kind, fields.get("exception") or fields.get("result")))


@pytest.fixture
def harness() -> Iterator[Harness]:
    with Harness(cancel_timeout=1000.0).running() as made:
        made.child(0).ready()
        yield made
        state.reserved_requests.clear()


def begun(harness: Harness, **given: Any) -> tuple[Child, Any]:
    delivered = Delivered(harness, **given)
    child = harness.child(0)
    child.accept(delivered)  # type: ignore[arg-type]
    return child, delivered


@pytest.mark.parametrize(
    ("outcome", "requeue", "expected"),
    [
        (None, False, ["acked", ("task-succeeded", "'text'")]),
        (Outcome.FAILURE, False, ["acked", ("task-failed", "proj.Oops('x')")]),
        (Outcome.RETRY, False, ["acked", ("task-retried", "proj.Oops('x')")]),
        (Outcome.IGNORE, False, ["acked"]),
        (Outcome.REJECT, True, [("rejected", True), ("task-rejected", None)]),
    ],
)
def test_celery_settles_the_message_as_for_its_own_pools(
    harness: Harness,
    outcome: str | None,
    requeue: bool,
    expected: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    child, delivered = begun(harness)
    if outcome is None:
        child.done(delivered)
    else:
        child.error(delivered, "x", type_name="proj.Oops", outcome=outcome, requeue=requeue)
    assert delivered.happened == [("task-started", None), *expected]
    assert "raised; the worker goes on" not in caplog.text


def test_celery_gives_a_lost_input_back_to_the_broker(harness: Harness) -> None:
    child, delivered = begun(harness)
    child.die()
    assert ("rejected", True) in delivered.happened
    assert "acked" not in delivered.happened


@pytest.mark.parametrize("acks_late", [True, False])
def test_an_input_that_has_not_begun_is_given_to_another_worker(acks_late: bool) -> None:
    class Model:
        @gw.method()
        async def run(self) -> None: ...
        @gw.method()
        async def is_ready(self) -> None: ...

    def declare(app: gw.App) -> None:
        probe = gw.Probe.on("is_ready", kind="readiness")
        app.cls(gpu=gw.Gpu("CPU"), probes=[probe])(Model)

    with Harness(declare=declare).running() as harness:
        harness.child(0).ready()
        delivered = Delivered(harness, ending=".Model.run", acks_late=acks_late)
        harness.advance(1.0)
        assert delivered.happened == [("rejected", True), ("task-rejected", None)]
        assert delivered.request not in state.reserved_requests


def test_celery_fails_an_input_at_its_hard_limit_once(harness: Harness) -> None:
    _, delivered = begun(harness, time_limits=(3.0, None))
    harness.advance(4.0)
    assert delivered.happened.count("acked") == 1
    kinds = [one[0] for one in delivered.happened if one != "acked"]
    assert kinds == ["task-started", "task-failed"]
    assert harness.app.AsyncResult(ID).state == "FAILURE"


def waiting(harness: Harness, **given: Any) -> tuple[Child, Any, Any]:
    """A delivered message that waits for the one slot, and what has it."""
    busy = harness.submit("plain")
    delivered = Delivered(harness, **given)
    return harness.child(0), busy, delivered


def test_an_input_that_is_revoked_while_it_waits_is_celerys_to_answer(harness: Harness) -> None:
    child, busy, delivered = waiting(harness)
    celery_request.revoked_tasks.add(ID)
    try:
        child.done(busy)
    finally:
        celery_request.revoked_tasks.pop_value(ID)
    assert delivered.happened.count("acked") == 1
    assert harness.app.AsyncResult(ID).state == "REVOKED"
    assert child.runs == [busy.id]


def test_an_input_that_cannot_be_checked_runs(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    child, busy, delivered = waiting(harness)
    delivered.request.revoked = raising(ConnectionError("backend"))
    child.done(busy)
    assert child.runs == [busy.id, ID]
    assert f"[{ID}] runs: its revocation could not be checked" in caplog.text


@pytest.mark.parametrize(("acks_late", "state_"), [(False, "FAILURE"), (True, "RETRY")])
def test_what_a_cold_shutdown_stops_fails_where_no_broker_has_it(
    harness: Harness, acks_late: bool, state_: str
) -> None:
    _, delivered = begun(harness, acks_late=acks_late)
    delivered.request.cancel(harness.pool)
    assert harness.app.AsyncResult(ID).state == state_


def test_a_result_backend_that_is_away_holds_up_no_cold_shutdown(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, delivered = begun(harness, acks_late=False)
    backend = delivered.request.task.backend
    monkeypatch.setattr(backend, "mark_as_failure", raising(ConnectionError("gone")))
    delivered.request.cancel(harness.pool)
    assert f"[{ID}] was running when its worker shut down" in caplog.text


def raising(exc: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise exc

    return fail
