"""The broker or the result backend of a worker on the GPU pool goes away and comes back."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ledger
import pytest
import redis
from celery import Celery

from gw_celery import devserver
from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(8)]


class Outage:
    """A server that a test stops and starts again, on the same data and address."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.server = devserver.start(directory)

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server = devserver.start(self._directory)

    def states(self, sent: list[str]) -> set[str]:
        """What is stored; an ``AsyncResult`` would subscribe, and fail with its server."""
        with redis.Redis(unix_socket_path=str(self.server.socket), db=1) as client:
            stored = client.mget([f"celery-task-meta-{one}" for one in sent])
        return {json.loads(one)["status"] if one else "PENDING" for one in stored}


@contextmanager
def outage(directory: Path) -> Iterator[Outage]:
    made = Outage(directory)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def broker(tmp_path: Path, redis_server: devserver.Server) -> Iterator[Outage]:
    """Broker and result backend in one, as in most small projects."""
    with outage(tmp_path / "broker") as made:
        yield made


@pytest.fixture
def app(broker: Outage) -> Iterator[Celery]:
    with pooling.client(broker.server.broker_url, "disabled://") as app:
        yield app


@pytest.fixture
def start_pooled(
    start_worker: StartWorker, ledger_path: Path, broker: Outage
) -> Callable[..., WorkerProcess]:
    urls = {"broker": broker.server.broker_url, "result": broker.server.result_url}
    return lambda **given: pooling.start(start_worker, ledger_path, **{**urls, **given})


def send(app: Celery, seconds: float, names: Iterable[str] = NAMES) -> list[str]:
    return [app.send_task("pooled.four", (one, seconds), queue="cpu.four").id for one in names]


def all_ended(ledger_path: Path) -> None:
    eventually(lambda: len({line[2] for line in ledger.words(ledger_path, "ended")}) == 8, 40)


@pytest.mark.parametrize("cancels", [False, True])
def test_a_broker_that_restarts_under_load_loses_nothing(
    cancels: bool,
    start_pooled: Callable[..., WorkerProcess],
    broker: Outage,
    app: Celery,
    ledger_path: Path,
) -> None:
    settings = {"worker_cancel_long_running_tasks_on_connection_loss": cancels}
    worker = start_pooled(settings=settings)
    sent = send(app, 1.0)
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
    broker.stop()
    eventually(lambda: "Connection to broker lost" in worker.log_text(), 20)
    broker.start()
    all_ended(ledger_path)
    eventually(lambda: broker.states(sent) == {"SUCCESS"}, 20)
    counts = pooling.counts(ledger_path, NAMES)
    # A worker that serves cancels nothing for it: what runs is answered to the next connection.
    assert counts == pooling.all_once(NAMES)
    sent = send(app, 0.0, ["later"])
    eventually(lambda: broker.states(sent) == {"SUCCESS"}, 20)


def test_a_broker_that_restarts_while_a_model_loads_is_served_afterwards(
    start_pooled: Callable[..., WorkerProcess], broker: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled(env={"LOAD": "4"}, is_loaded=False)
    sent = send(app, 0.1)
    eventually(lambda: ledger.words(ledger_path, "entering"))
    broker.stop()
    eventually(lambda: "Connection to broker lost" in worker.log_text(), 20)
    broker.start()
    all_ended(ledger_path)
    eventually(lambda: broker.states(sent) == {"SUCCESS"}, 20)
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    # The load did not begin again because of it.
    assert pooling.wrote(ledger_path, "entering", "Model") == 1


def test_a_model_becomes_ready_while_the_broker_is_away(
    start_pooled: Callable[..., WorkerProcess], broker: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled(env={"LOAD": "2"}, is_loaded=False)
    sent = send(app, 0.1)
    eventually(lambda: ledger.words(ledger_path, "entering"))
    broker.stop()
    eventually(lambda: ledger.words(ledger_path, "entered"))
    broker.start()
    all_ended(ledger_path)
    eventually(lambda: broker.states(sent) == {"SUCCESS"}, 20)
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    assert worker.exit_code is None


def test_a_model_loads_before_there_is_a_broker(
    start_pooled: Callable[..., WorkerProcess], broker: Outage, app: Celery, ledger_path: Path
) -> None:
    broker.stop()
    start_pooled(wait_ready=False)
    eventually(lambda: ledger.words(ledger_path, "entered"), 20)
    broker.start()
    sent = send(app, 0.1)
    all_ended(ledger_path)
    eventually(lambda: broker.states(sent) == {"SUCCESS"}, 20)
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_a_child_that_dies_while_the_broker_is_away_is_replaced(
    start_pooled: Callable[..., WorkerProcess], broker: Outage, app: Celery, ledger_path: Path
) -> None:
    worker = start_pooled()
    broker.stop()
    eventually(lambda: "Connection to broker lost" in worker.log_text(), 20)
    (pid,) = {int(line[0]) for line in ledger.words(ledger_path, "entered")}
    os.kill(pid, signal.SIGKILL)
    broker.start()
    sent = send(app, 0.0)
    all_ended(ledger_path)
    eventually(lambda: broker.states(sent) == {"SUCCESS"}, 20)
    assert pooling.wrote(ledger_path, "entered", "Model") == 2


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
            all_ended(ledger_path)
            eventually(lambda: results.states(sent) == {"SUCCESS"}, 20)
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
            eventually(lambda: results.states(sent) == {"SUCCESS"}, 20)
    assert pooling.counts(ledger_path, bodies) == pooling.all_once(bodies)


def test_an_input_whose_result_cannot_be_stored_is_given_back(
    start_worker: StartWorker, ledger_path: Path, redis_url: str, tmp_path: Path
) -> None:
    with outage(tmp_path / "results") as results:
        url = results.server.result_url
        pooling.start(start_worker, ledger_path, result=url, settings={"gw_store_timeout": 1.0})
        with pooling.client(redis_url, "disabled://") as app:
            sent = send(app, 0.5, ["kept"])
            eventually(lambda: pooling.began(ledger_path, "kept"))
            results.stop()
            eventually(lambda: len(pooling.began(ledger_path, "kept")) >= 2, 40)
            results.start()
            eventually(lambda: results.states(sent) == {"SUCCESS"}, 40)
    assert pooling.counts(ledger_path, ["kept"])["lost"] == 0
