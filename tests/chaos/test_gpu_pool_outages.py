"""The broker or the result backend of a worker on the GPU pool goes away and comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ledger
import pytest
from celery import Celery

from gw_celery import testing
from tests import pooling
from tests.outages import Outage, outage
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(8)]


@pytest.fixture
def broker(tmp_path: Path, redis_server: testing.Server) -> Iterator[Outage]:
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
