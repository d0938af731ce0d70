"""The GPU pool on other brokers than Redis, and with other result backends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest
from celery import Celery, chain, chord
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from kombu import pools

from tests import pooling, services
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

Send = Callable[..., Any]


@pytest.fixture(params=["redis", "rpc", "file"])
def result(request: pytest.FixtureRequest, result_url: str, tmp_path: Path) -> str:
    (tmp_path / "results").mkdir()
    urls = {"redis": result_url, "rpc": "rpc://", "file": f"file://{tmp_path}/results"}
    return urls[request.param]


@pytest.fixture
def client(rabbitmq_url: str, result: str) -> Iterator[Celery]:
    with pooling.client(rabbitmq_url, result) as app:
        yield app


@pytest.fixture
def worker(
    start_worker: StartWorker, ledger_path: Path, rabbitmq_url: str, result: str
) -> WorkerProcess:
    return pooling.start(start_worker, ledger_path, broker=rabbitmq_url, result=result)


@pytest.fixture
def send(client: Celery) -> Send:
    """Send a task of ``pooled`` by its name."""

    def send_task(name: str, *args: Any, queue: str = "", **options: Any) -> Any:
        queue = queue or f"cpu.{name.partition('.')[0]}"
        return client.send_task(f"pooled.{name}", args, queue=queue, **options)

    return send_task


def test_rabbitmq_serves_limits_revocation_and_death(
    worker: WorkerProcess, client: Celery, send: Send, ledger_path: Path
) -> None:
    sent = [send("add", x) for x in range(200)]
    assert [one.get(timeout=30) for one in sent] == list(range(1, 201))
    assert send("Desk.sit", "sync", 0.1).get(timeout=20) == "sync"
    assert send("plain", 1, queue="celery").get(timeout=20) == 2
    assert send("retried", 2).get(timeout=20)[0] == 2
    with pytest.raises(TimeLimitExceeded):
        send("four", "limited", 30.0, time_limit=0.5).get(timeout=20)
    revoked = send("four", "revoked", 30.0)
    eventually(lambda: pooling.began(ledger_path, "revoked"))
    client.control.revoke(revoked.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=20)
    survivor = send("four", "survivor", 1.0)
    (pid,) = eventually(lambda: pooling.began(ledger_path, "survivor"))
    os.kill(pid, signal.SIGKILL)
    assert survivor.get(timeout=30) == "survivor"
    assert len(pooling.began(ledger_path, "survivor")) == 2
    assert worker.stop() == 0


def test_rabbitmq_gives_back_what_a_stopping_worker_has_not_begun(
    worker: WorkerProcess,
    client: Celery,
    send: Send,
    start_worker: StartWorker,
    ledger_path: Path,
    rabbitmq_url: str,
    result: str,
) -> None:
    names = [f"n{number}" for number in range(8)]
    sent = [send("four", name, 2.0) for name in names]
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
    assert worker.stop() == 0
    assert len(ledger.words(ledger_path, "ended")) == 4
    pooling.start(start_worker, ledger_path, broker=rabbitmq_url, result=result)
    # Celery 5.6 connects anew after each second in which RPC brings no answer.
    eventually(lambda: len(ledger.words(ledger_path, "ended")) == 8, 30)
    assert [one.get(timeout=20) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)


@pytest.mark.parametrize("result", ["redis"], indirect=True)
def test_quorum_queues_fill_every_slot(
    client: Celery, start_worker: StartWorker, ledger_path: Path, rabbitmq_url: str, result: str
) -> None:
    # Queues of another type by the same names exist in the tests' virtual host.
    settings = {"task_default_queue_type": "quorum", "task_create_missing_queue_type": "quorum"}
    with services.rabbitmq_vhost() as url, pooling.client(url, result) as app:
        app.conf.update(settings)
        pooling.start(start_worker, ledger_path, broker=url, result=result, settings=settings)
        names = [f"n{number}" for number in range(8)]
        sent = [app.send_task("pooled.four", (one, 2.0), queue="cpu.four") for one in names]
        eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
        assert ledger.words(ledger_path, "ended") == []
        assert [one.get(timeout=30) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)


# Answers over RPC are lost with the connection of the client.
@pytest.mark.parametrize("result", ["redis"], indirect=True)
def test_a_lost_rabbitmq_connection_heals_and_nothing_is_lost(
    worker: WorkerProcess, client: Celery, send: Send, ledger_path: Path, rabbitmq_url: str
) -> None:
    names = [f"n{number}" for number in range(8)]
    sent = [send("four", name, 2.0) for name in names]
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
    _cut(rabbitmq_url)
    eventually(lambda: worker.log_text().count("Connected to amqp") == 2, 20)
    # Those in flight were delivered again while they ran: they are not begun again.
    assert [one.get(timeout=30) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)


def _cut(url: str) -> None:
    """Close every connection of the test run's virtual host, as a restart of the broker would."""
    vhost = url.rpartition("/")[2]
    # This process's own would be cut, too, leave their sockets open, and fail the next test. A
    # closed pool is of no use: the next connection makes another.
    for key, pool in list(pools.connections.items()):
        if pool.connection.virtual_host == vhost:
            pools.producers.pop(key, None)
            pools.connections.pop(key).force_close_all()
    services._rabbitmqctl("close_all_connections", "-p", vhost, "cut by a test")


def test_a_transport_without_an_event_loop_serves(
    start_worker: StartWorker, ledger_path: Path, tmp_path: Path, result_url: str
) -> None:
    (tmp_path / "messages").mkdir()
    (tmp_path / "control").mkdir()
    options = {
        "data_folder_in": str(tmp_path / "messages"),
        "data_folder_out": str(tmp_path / "messages"),
        "control_folder": str(tmp_path / "control"),
    }
    worker = pooling.start(
        start_worker,
        ledger_path,
        broker="filesystem://",
        settings={"broker_transport_options": options},
        wait_ready=False,
    )
    pooling.wait_loaded(worker)
    with pooling.client("filesystem://", result_url) as app:
        app.conf.broker_transport_options = options
        sent = [app.send_task("pooled.add", (x,), queue="cpu.add") for x in range(20)]
        assert [one.get(timeout=30) for one in sent] == list(range(1, 21))
        sent = app.send_task("pooled.four", ("soft", 30.0), queue="cpu.four", soft_time_limit=0.5)
        assert sent.get(timeout=20) == "soft"
        with pytest.raises(TimeLimitExceeded):
            app.send_task("pooled.four", ("hard", 30.0), queue="cpu.four", time_limit=0.5).get(
                timeout=20
            )
        last = app.send_task("pooled.four", ("last", 1.0), queue="cpu.four")
        eventually(lambda: pooling.began(ledger_path, "last"))
        assert worker.stop() == 0
        assert last.get(timeout=5) == "last"


def test_canvas_with_results_in_files(
    start_worker: StartWorker, ledger_path: Path, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    result = f"file://{tmp_path}/results"
    pooling.start(start_worker, ledger_path, result=result)
    with pooling.client(redis_url, result) as app:

        def part(x: int) -> Any:
            return app.signature("pooled.add", (x,), queue="cpu.add")

        add = app.signature("pooled.add", queue="cpu.add")
        assert chain(part(1), add, add, app=app)().get(timeout=20) == 4
        total = app.signature("pooled.total", queue="cpu.total")
        parts = [part(x) for x in range(20)]
        assert chord(parts, total, app=app)().get(timeout=30) == sum(range(1, 21))


@pytest.mark.parametrize("result", ["redis"], indirect=True)
@pytest.mark.parametrize("arguments", [{"durable": False}, {"exchange_type": "nonsense"}])
def test_a_queue_that_rabbitmq_refuses_ends_no_worker_and_stops_no_other_queue(
    worker: WorkerProcess, client: Celery, send: Send, arguments: dict[str, Any]
) -> None:
    with client.connection_for_write() as connection:
        connection.default_channel.queue_declare("odd", durable=True, auto_delete=False)
    told = {"queue": "odd", **arguments}
    client.control.broadcast("add_consumer", told, reply=True, timeout=5)
    eventually(lambda: "the command add_task_queue" in worker.log_text(), 20)
    assert send("add", 1).get(timeout=20) == 2, worker.log_tail()
    client.control.add_consumer("correct", reply=True)
    assert send("plain", 1, queue="correct").get(timeout=20) == 2, worker.log_tail()
