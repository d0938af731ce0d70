"""The result backend of a worker on the GPU pool goes away and comes back."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ledger
import pytest
from celery import Celery

from tests import pooling
from tests.outages import REFUSALS, Outage, outage
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(8)]
LATER = [f"later{number}" for number in range(20)]
PAUSED = "no queue is consumed until results can be stored again"
RESUMED = "queues are consumed again"


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Outage]:
    with outage(tmp_path / "results") as made:
        yield made


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    with pooling.client(broker_url, "disabled://") as app:
        yield app


@pytest.fixture
def start_pooled(
    start_worker: StartWorker, ledger_path: Path, broker_url: str, results: Outage
) -> Callable[..., WorkerProcess]:
    urls = {"broker": broker_url, "result": results.server.result_url}
    return lambda **given: pooling.start(start_worker, ledger_path, **{**urls, **given})


def send(app: Celery, seconds: float, names: Iterable[str] = NAMES) -> list[str]:
    return [app.send_task("pooled.four", (one, seconds), queue="cpu.four").id for one in names]


def said(worker: WorkerProcess, text: str) -> int:
    return worker.log_text().count(text)


def is_stored(results: Outage, sent: list[str]) -> bool:
    """Whether the results of all are stored before long."""
    return eventually(lambda: results.states(sent) == {"SUCCESS"}, 40)


def queued(app: Celery) -> int:
    """How many messages no worker has taken."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        try:
            return int(channel.queue_declare("cpu.four", passive=True).message_count)
        except connection.channel_errors:  # on Redis there is no queue without a message
            return 0


def outage_told(worker: WorkerProcess, app: Celery) -> str:
    return str((pooling.ask(worker, "stats", app) or {"pool": {}})["pool"].get("gw_outage", ""))


def paused(worker: WorkerProcess, app: Celery) -> None:
    """Wait until the worker tells operators that it has paused, and closed its queues."""
    eventually(lambda: outage_told(worker, app), 20)
    options: dict[str, Any] = {"reply": True, "destination": [worker.node], "timeout": 15}

    def shown() -> tuple[bool, list[str]]:
        (answer,) = app.control.broadcast("gw_status", **options)
        status = answer[worker.node]
        return bool(status["outage"]), status["open_queues"]

    # The queues close a turn of the worker's loop after it has heard of the outage.
    eventually(lambda: shown() == (True, []))


def test_no_message_is_taken_while_results_cannot_be_stored(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = send(app, 0.5)  # four run, and four are taken and wait for a slot
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
    results.stop()
    eventually(lambda: len(ledger.words(ledger_path, "ended")) == 4)
    paused(worker, app)
    sent += send(app, 0.1, LATER)
    for _ in range(5):  # each a turn of the worker's loop, in which it would take them
        assert pooling.ask(worker, "ping", app) == {"ok": "pong"}
    assert queued(app) == len(LATER)
    assert len(ledger.words(ledger_path, "began")) == 4
    assert (said(worker, PAUSED), said(worker, RESUMED)) == (1, 0)
    results.start()
    assert is_stored(results, sent)
    assert pooling.counts(ledger_path, NAMES + LATER) == pooling.all_once(NAMES + LATER)
    assert (said(worker, PAUSED), said(worker, RESUMED)) == (1, 1)
    assert outage_told(worker, app) == ""


@pytest.mark.parametrize("kind", ["down", "frozen"])
def test_no_refusal_is_lost_nor_holds_up_the_worker_while_it_cannot_be_stored(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, kind: str
) -> None:
    worker = start_pooled(settings={"gw_max_queue_time": 5.0})
    late = {"gw-enqueued": time.time() - 60}
    freeze = {"down": (results.stop, results.start)}.get(kind) or tuple(
        lambda signum=signum: os.kill(results.server.pid, signum)
        for signum in (signal.SIGSTOP, signal.SIGCONT)
    )
    freeze[0]()
    try:
        sent = [
            app.send_task("pooled.four", (one, 0.0), queue="cpu.four", headers=late).id
            for one in NAMES
        ]
        paused(worker, app)
        assert pooling.ask(worker, "ping", app) == {"ok": "pong"}
    finally:
        freeze[1]()
    # One that was given back meanwhile is delivered again, and such an input is never refused.
    assert eventually(lambda: results.states(sent) <= {"FAILURE", "SUCCESS"}, 60)


def test_an_input_whose_result_cannot_be_stored_is_given_back_and_runs_after_the_outage(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"gw_store_timeout": 1.0})
    sent = send(app, 0.5, ["kept"])
    eventually(lambda: pooling.began(ledger_path, "kept"))
    results.stop()
    # It is with the broker again, nothing is in flight, and it is not taken.
    eventually(lambda: queued(app) == 1, 60)
    paused(worker, app)
    assert len(pooling.began(ledger_path, "kept")) == 1
    results.start()
    assert is_stored(results, sent)
    assert len(pooling.began(ledger_path, "kept")) == 2
    assert (said(worker, PAUSED), said(worker, RESUMED)) == (1, 1)


def test_a_replica_that_dies_in_an_outage_leaves_no_queue_closed(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = send(app, 0.5, ["killed"])
    eventually(lambda: pooling.began(ledger_path, "killed"))
    results.stop()
    paused(worker, app)
    os.kill(pooling.began(ledger_path, "killed")[0], signal.SIGKILL)
    # The worker itself cannot store either: the new replica takes nothing in vain.
    eventually(lambda: worker.log_text().count("is ready\n") == 2, 40)
    eventually(lambda: outage_told(worker, app), 20)
    assert len(pooling.began(ledger_path, "killed")) == 1
    results.start()
    assert is_stored(results, sent)
    assert len(pooling.began(ledger_path, "killed")) == 2
    eventually(lambda: said(worker, RESUMED) == said(worker, PAUSED), 20)
    sent = send(app, 0.0, ["after"])
    assert is_stored(results, sent)


MANY = [f"many{number}" for number in range(30)]


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_server_that_refuses_for_now_costs_no_input_and_no_body(
    start_pooled: Callable[..., WorkerProcess],
    results: Outage,
    app: Celery,
    ledger_path: Path,
    kind: str,
) -> None:
    worker = start_pooled()
    sent = send(app, 0.3, MANY)
    eventually(lambda: len(ledger.words(ledger_path, "began")) >= 4)
    with results.being(kind):
        paused(worker, app)
        stopped = time.monotonic()
        eventually(lambda: pooling.ask(worker, "ping", app) and time.monotonic() - stopped > 3.0)
    assert is_stored(results, sent)
    assert pooling.counts(ledger_path, MANY) == pooling.all_once(MANY)
    assert worker.exit_code is None
    assert (said(worker, PAUSED), said(worker, RESUMED)) == (1, 1)
    assert said(worker, "results cannot be stored: ") == 1


def test_a_refusal_for_longer_than_results_are_kept_costs_a_body_for_each_slot(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"gw_store_timeout": 1.0})
    sent = send(app, 0.3, MANY)
    eventually(lambda: len(ledger.words(ledger_path, "began")) >= 4)
    with results.being("READONLY"):
        paused(worker, app)
        eventually(lambda: said(worker, "its outcome could not be stored") >= 1, 20)
        stopped = time.monotonic()
        eventually(lambda: pooling.ask(worker, "ping", app) and time.monotonic() - stopped > 3.0)
    assert is_stored(results, sent)
    assert len(ledger.words(ledger_path, "began")) <= len(MANY) + 4
    assert said(worker, "its outcome could not be stored") <= 4


# -- what the worker itself stores --


def status_of(results: Outage, task_id: str) -> str:
    return next(iter(results.states([task_id])))


def hit_the_limit(app: Celery) -> str:
    options: dict[str, Any] = {"queue": "cpu.four", "time_limit": 2}
    return app.send_task("pooled.four", ("limited", 60.0), **options).id


def be_lost(app: Celery) -> str:
    """Run where the death of the child is the input's own: acknowledged, and not given back."""
    return app.send_task("pooled.early", ("limited", 60.0), queue="cpu.early").id


def be_lost_late(app: Celery) -> str:
    return app.send_task("pooled.unforgiven", ("limited", 60.0), queue="cpu.unforgiven").id


@pytest.mark.parametrize("kind", ["READONLY", "OOM", "down", "frozen"])
@pytest.mark.parametrize("start", [hit_the_limit, be_lost, be_lost_late])
def test_an_outcome_that_the_worker_stores_waits_for_the_results_too(
    start_pooled: Callable[..., WorkerProcess],
    results: Outage,
    app: Celery,
    ledger_path: Path,
    start: Callable[[Celery], str],
    kind: str,
) -> None:
    # Nothing else is stored: this process is the first that hears of the outage.
    worker = start_pooled()
    task_id = start(app)
    (pid,) = eventually(lambda: pooling.began(ledger_path, "limited"))
    with results.being(kind):
        if start is not hit_the_limit:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: outage_told(worker, app), 30)
        for _ in range(3):
            began = time.monotonic()
            assert pooling.ask(worker, "ping", app) == {"ok": "pong"}
            assert time.monotonic() - began < 5.0
    eventually(lambda: status_of(results, task_id) == "FAILURE", 40)
    assert len(pooling.began(ledger_path, "limited")) == 1
    assert is_stored(results, send(app, 0.0, ["after"]))
    assert worker.exit_code is None


def test_an_input_whose_limit_cannot_be_stored_goes_back_to_the_broker(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"gw_store_timeout": 1.0})
    task_id = hit_the_limit(app)
    eventually(lambda: pooling.began(ledger_path, "limited"))
    with results.being("READONLY"):
        eventually(lambda: queued(app) == 1, 30)
        paused(worker, app)
        assert len(pooling.began(ledger_path, "limited")) == 1
    eventually(lambda: status_of(results, task_id) == "FAILURE", 40)
    assert len(pooling.began(ledger_path, "limited")) == 2


@pytest.mark.parametrize("kind", ["READONLY", "down"])
@pytest.mark.parametrize("is_expired", [False, True])
def test_an_input_that_must_not_run_waits_for_the_results(
    start_pooled: Callable[..., WorkerProcess],
    results: Outage,
    app: Celery,
    broker_url: str,
    ledger_path: Path,
    kind: str,
    is_expired: bool,
) -> None:
    worker = start_pooled()
    # Celery sends it with a lifetime, after which RabbitMQ delivers a message to nobody.
    is_deleted = is_expired and broker_url.startswith("amqp")
    task_id = uuid.uuid4().hex
    options: dict[str, Any] = {"queue": "cpu.four", "task_id": task_id}
    if is_expired:
        options["expires"] = datetime.now(UTC) - timedelta(seconds=60)
    else:
        app.control.revoke(task_id, destination=[worker.node])
        eventually(lambda: task_id in (pooling.ask(worker, "revoked", app) or ()))
    with results.being(kind):
        app.send_task("pooled.four", ("never", 0.0), **options)
        paused(worker, app)
        assert pooling.ask(worker, "ping", app) == {"ok": "pong"}
        worker.wait_for_log(f"{task_id} is given back: ", 20)
        eventually(lambda: queued(app) == (0 if is_deleted else 1), 20)
    assert is_deleted or eventually(lambda: status_of(results, task_id) == "REVOKED", 40)
    assert is_stored(results, send(app, 0.0, ["after"]))
    assert pooling.began(ledger_path, "never") == []
    assert said(worker, "is given back: ") < 10


def test_a_terminate_in_an_outage_is_refused_and_can_be_repeated(
    start_pooled: Callable[..., WorkerProcess], results: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled()
    (running,) = send(app, 60.0, ["running"])
    (ended,) = send(app, 1.0, ["ended"])
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 2)
    options: dict[str, Any] = {"reply": True, "destination": [worker.node], "timeout": 15}

    def terminate() -> Any:
        (answer,) = app.control.terminate(running, signal="SIGTERM", **options)
        return answer[worker.node]

    with results.being("READONLY"):
        paused(worker, app)
        assert "terminate it again after the outage" in str(terminate())
    assert is_stored(results, [ended])
    eventually(lambda: not outage_told(worker, app), 20)
    terminate()
    eventually(lambda: status_of(results, running) == "REVOKED", 20)


def test_one_redis_for_messages_and_results_goes_away_for_longer_than_results_are_kept(
    start_worker: StartWorker, ledger_path: Path, tmp_path: Path
) -> None:
    with outage(tmp_path / "one") as both:
        urls = {"broker": both.server.broker_url, "result": both.server.result_url}
        settings = {"gw_store_timeout": 1.0}
        worker = pooling.start(start_worker, ledger_path, settings=settings, **urls)
        with pooling.client(urls["broker"], "disabled://") as app:
            sent = send(app, 0.5)
            eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
            both.stop()
            eventually(
                lambda: said(worker, "has no result: its outcome could not be stored") == 4, 30
            )
            both.start()
            assert is_stored(both, sent)
            sent = send(app, 0.0, ["after"])
            assert is_stored(both, sent)


def test_results_wait_for_a_result_backend_that_is_away(
    start_worker: StartWorker, ledger_path: Path, redis_url: str, tmp_path: Path
) -> None:
    with outage(tmp_path / "results") as results:
        url = results.server.result_url
        worker = pooling.start(start_worker, ledger_path, result=url)
        with pooling.client(redis_url, "disabled://") as app:
            sent = send(app, 0.5)
            eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
            results.stop()
            eventually(lambda: len(ledger.words(ledger_path, "ended")) == 4)
            # The worker answers, and its loop is free: only the results wait.
            assert pooling.ask(worker, "ping", app) == {"ok": "pong"}
            eventually(lambda: max(one["lag"] for one in pooling.replicas(worker, app)) < 0.5)
            results.start()
            assert is_stored(results, sent)
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_the_results_of_bodies_in_threads_wait_too(
    start_worker: StartWorker, ledger_path: Path, redis_url: str, tmp_path: Path
) -> None:
    bodies = {"sit": "pooled.Desk.sit", "rest": "pooled.plain_rest"}
    with outage(tmp_path / "results") as results:
        pooling.start(start_worker, ledger_path, result=results.server.result_url)
        with pooling.client(redis_url, "disabled://") as app:
            queues = {"sit": "cpu.Desk", "rest": "celery"}
            sent = [
                app.send_task(task, (name, 1.0), queue=queues[name]).id
                for name, task in bodies.items()
            ]
            eventually(lambda: len(ledger.words(ledger_path, "began")) == len(bodies))
            results.stop()
            eventually(lambda: len(ledger.words(ledger_path, "ended")) == len(bodies))
            results.start()
            assert is_stored(results, sent)
    assert pooling.counts(ledger_path, bodies) == pooling.all_once(bodies)
