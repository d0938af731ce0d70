"""What a worker's parent stores: not after it was declared lost, and without waiting for Redis."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, signals
from celery.exceptions import NotRegistered
from celery.utils.objects import Bunch
from celery.worker.request import Request
from kombu.message import Message

from gw_celery import errors
from gw_celery.cluster import fence, lost_workers
from tests import outages, services
from tests.processes import eventually

LOST = "w@host:1.0"
SIGNATURE = {"task": "unit.other", "args": [], "kwargs": {}, "options": {}, "immutable": True}


@pytest.fixture
def results(result_url: str) -> Iterator[redis.Redis]:
    with services.redis_at(result_url) as client:
        yield client


@pytest.fixture
def published() -> Iterator[list[str]]:
    ids: list[str] = []

    def note(headers: Any = None, **_: Any) -> None:
        ids.append(headers["id"])

    signals.before_task_publish.connect(note)
    yield ids
    signals.before_task_publish.disconnect(note)


def worker_of(result_url: str) -> Any:
    """An app as the parent of a pool has it."""
    app: Any = Celery("unit", broker="memory://", set_as_current=False)
    app.backend_cls = result_url  # the environment of a test names another one

    @app.task(name="unit.task", acks_late=True)
    def task() -> None: ...

    fence.install_in_parent(app, operator.call)
    return app


def received(app: Any, task_id: str, tag: Any = f"{LOST}/7") -> Request:
    """Celery's request of a message, with an errback."""
    embed = {"errbacks": [SIGNATURE], "callbacks": None, "chain": None, "chord": None}
    body = app.amqp.create_task_message(task_id, "unit.task")
    message = Message(
        body=b'[[], {}, {"errbacks": null}]',
        content_type="application/json",
        content_encoding="utf-8",
        delivery_tag=tag,
        properties={"delivery_tag": tag},
        headers=body.headers,
        accept=["json"],
    )
    message._decoded_cache = ([], {}, embed)
    return Request(message, app=app, task=app.tasks["unit.task"])


def failure(exc: BaseException) -> ExceptionInfo:
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()


ANSWERS = [
    lambda request: request.on_timeout(False, 1.0),
    lambda request: request.on_failure(failure(WorkerLostError("gone"))),
    lambda request: request.on_failure(failure(Terminated(15))),
    lambda request: request._announce_revoked("revoked", False, None, False),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_worker_that_was_declared_lost_answers_nothing(
    answer: Any, result_url: str, results: redis.Redis, published: list[str]
) -> None:
    app = worker_of(result_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "acknowledge", lambda self: None)
        answer(received(app, "living"))
        announced = list(published)
        assert results.get("celery-task-meta-living")
        results.set(f"gw:dead:{LOST}", "other")
        with pytest.raises(errors.DeclaredLost, match="another worker runs it"):
            answer(received(app, "lost"))
        answer(received(app, "next", "w@host:1.1/1"))
    assert results.get("celery-task-meta-lost") is None
    assert results.get("celery-task-meta-next")
    assert len(published) == 2 * len(announced)


@pytest.mark.parametrize("prefix", ["", "project"])
def test_the_tombstone_is_beside_the_results(
    result_url: str, results: redis.Redis, prefix: str
) -> None:
    app = worker_of(result_url)
    app.conf.result_backend_transport_options = {"global_keyprefix": prefix}
    key = f"{prefix}_gw:dead:{LOST}" if prefix else f"gw:dead:{LOST}"
    results.set(key, "other")
    request = received(app, "lost")._context
    with pytest.raises(errors.DeclaredLost):
        app.backend.store_result("lost", 1, "SUCCESS", request=request)


def test_another_backend_asks_the_broker(redis_url: str) -> None:
    app = worker_of("cache+memory://")
    app.conf.broker_url = redis_url
    request = received(app, "lost")._context
    app.backend.store_result("lost", 1, "STARTED", request=request)
    with services.redis_at(redis_url) as broker:
        broker.set(f"gw:dead:{LOST}", "other")
    with pytest.raises(errors.DeclaredLost):
        app.backend.store_result("lost", 1, "SUCCESS", request=request)
    assert app.AsyncResult("lost").state == "STARTED"
    assert fence.results_of(app) is None


@pytest.mark.parametrize("backend", ["redis", "memory"])
def test_a_message_for_no_task_fails(backend: str, result_url: str) -> None:
    """Celery then passes an object that is no request."""
    app = worker_of(result_url if backend == "redis" else "cache+memory://")
    unknown = Bunch(name="unit.unknown", chord=None, root_id=None, errbacks=None)
    app.backend.mark_as_failure("unknown", NotRegistered("unit.unknown"), request=unknown)
    assert app.AsyncResult("unknown").state == "FAILURE"


@pytest.mark.parametrize("backend", ["redis", "memory"])
@pytest.mark.parametrize(
    "exc",
    [NotRegistered("x" * 100_000), WorkerLostError(["x" * 100_000]), KeyError(*"x" * 100_000)],
)
def test_an_error_is_cut_where_it_is_stored(backend: str, exc: Exception, result_url: str) -> None:
    app = worker_of(result_url if backend == "redis" else "cache+memory://")
    app.backend.mark_as_failure("long", exc, traceback="line\n" * 100_000)
    stored = app.backend.get(app.backend.get_key_for_task("long"))
    assert len(stored) < 1.2 * errors.LONGEST_TRACEBACK + 25 * errors.LONGEST_TEXT
    meta = app.backend.get_task_meta("long")
    assert type(meta["result"]).__name__ == type(exc).__name__
    assert len(str(meta["result"].args)) < 2 * errors.LONGEST_TEXT


@pytest.mark.parametrize(
    ("backend", "has_records"),
    [
        ("redis://127.0.0.1:1/0", True),
        ("sentinel://127.0.0.1:1/0", False),
        ("cache+memory://", False),
    ],
)
@pytest.mark.parametrize("is_parent", [True, False])
def test_early_acknowledged_inputs_have_records_where_children_can_write_them(
    backend: str, has_records: bool, is_parent: bool
) -> None:
    with Celery("unit", broker="memory://", set_as_current=False) as app:
        app.backend_cls = backend
        if is_parent:
            fence.install_in_parent(app)
        lost = lost_workers.LostWorkers(app, "w@host:1", 1.0)
        assert (lost.early is not None) == has_records


@pytest.mark.parametrize("kind", [*outages.REFUSALS, "down", "frozen"])
def test_the_parent_does_not_wait_for_results_that_are_away(tmp_path: Path, kind: str) -> None:
    with outages.outage(tmp_path / "results") as server:
        app = worker_of(server.server.result_url)
        results = fence.results_of(app)
        assert results is not None

        def store(task_id: str) -> None:
            app.backend.store_result(task_id, 1, "SUCCESS")

        store("before")
        with server.being(kind):
            with pytest.raises(errors.ResultsUnavailable):
                store("first")
            began = time.monotonic()
            for _ in range(20):
                with pytest.raises(errors.ResultsUnavailable):
                    store("next")
            assert time.monotonic() - began < 1.0
            assert results.reason
        eventually(lambda: not results.reason, 20)
        store("after")
        assert server.states(["before", "after"]) == {"SUCCESS"}
        results.close()
