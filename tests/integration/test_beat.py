"""Beat's sweeps, from a real beat to the ticks that real workers hear."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest
import redis
import ticked
from celery import Celery

from gw_celery import devserver
from gw_celery.client import beat_tasks
from tests import pooling
from tests.processes import Process, StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

SENT = "Sending due task gw_celery.probe_sweep"
#: What probes and benchmarks do at a tick is not this file's matter.
QUIET = {"DECLARED": "probe"}
GPU_POOL = {"worker_pool": "gw_celery.pool:TaskPool"}

StartBeat = Callable[..., Process]
Start = Callable[..., WorkerProcess]


@pytest.fixture
def start_beat(redis_url: str, result_url: str, tmp_path: Path) -> Iterator[StartBeat]:
    """Start ``celery beat`` of ``ticked``, on the same file every time; stopped at the end."""
    started: list[Process] = []

    def start(broker: str = redis_url, level: str = "INFO", **env: str) -> Process:
        command = [sys.executable, "-m", "celery", "-A", "ticked:celery", "beat", "-l", level]
        command += ["-s", str(tmp_path / "schedule")]
        urls = {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": result_url}
        log = tmp_path / f"beat{len(started)}.log"
        started.append(Process(command, log, env={**urls, **QUIET, **env}))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def start(start_worker: StartWorker, ledger_path: Path) -> Start:
    """Start a worker of ``ticked``, on the GPU pool unless another one is named."""

    def start(pool: str = "", env: dict[str, str] | None = None, **options: Any) -> WorkerProcess:
        settings = {} if pool else GPU_POOL
        given = {"LEDGER": str(ledger_path), "SETTINGS": json.dumps(settings), **QUIET}
        return start_worker(
            "ticked:celery", pool=pool or "prefork", env={**given, **(env or {})}, **options
        )

    return start


def age(worker: WorkerProcess, kind: str = "probe", app: Any = ticked.celery) -> float | None:
    """Seconds since the worker heard a tick; ``None`` before the first."""
    stats = pooling.ask(worker, "stats", app) or {"pool": {"gw_tick_ages": {}}}
    found: dict[str, float] = stats["pool"]["gw_tick_ages"]
    return found.get(kind)


def swept(path: Path) -> list[list[str]]:
    return ledger.words(path, "swept")


def sweep(name: str = beat_tasks.PROBE, **options: Any) -> Any:
    return ticked.celery.send_task(name, queue=beat_tasks.QUEUE, ignore_result=True, **options)


def test_every_worker_hears_every_tick_while_its_replicas_load(
    start: Start, start_beat: StartBeat, redis_server: devserver.Server, ledger_path: Path
) -> None:
    listening = [start(env={"LOAD": "300"}) for _ in range(2)]
    beat = start_beat(SETTINGS=json.dumps({"gw_benchmark_period": 2}), DECLARED="probe,benchmark")
    beat.wait_for_log(SENT, times=2)
    for worker in listening:
        for kind in ("probe", "benchmark"):
            eventually(lambda worker=worker, kind=kind: age(worker, kind) is not None, 20)
        assert pooling.ready_pids(worker, ticked.celery) == []
        assert pooling.ask(worker, "active_queues", ticked.celery) == []
    eventually(lambda: len(swept(ledger_path)) >= 4, 20)
    ran = swept(ledger_path)
    assert {line[3] for line in ran} == {"gw-sweeps"}, "never in a child or in the worker's loop"
    assert {int(line[0]) for line in ran} <= {worker.pid for worker in listening}
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as results:
        assert results.keys("celery-task-meta-*") == []
    for worker in listening:
        assert "raised" not in worker.log_text()


def test_ticks_that_expired_while_nobody_listened_are_not_run(
    start: Start, redis_server: devserver.Server, ledger_path: Path
) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    stale = [sweep(expires=past) for _ in range(5)]
    worker = start()
    live = sweep()
    eventually(lambda: len(swept(ledger_path)) == 1, 20)
    worker.wait_for_log(f"{live.id}] succeeded")
    for one in stale:
        assert f"Discarding revoked task: {beat_tasks.PROBE}[{one.id}]" in worker.log_text()
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as results:
        assert results.keys("celery-task-meta-*") == []


def test_a_full_pool_runs_them_and_takes_no_input_more_for_it(
    start: Start, ledger_path: Path
) -> None:
    worker = start(queues="cpu.hold")
    eventually(lambda: pooling.ready_pids(worker, ticked.celery), 20)
    for _ in range(4):
        ticked.hold.delay(seconds=60.0)
    stats = eventually(lambda: pooling.ask(worker, "stats", ticked.celery))
    slots = stats["prefetch_count"]
    eventually(lambda: len(pooling.ask(worker, "active", ticked.celery)) == 1)
    for count in range(1, 4):
        sweep()
        eventually(lambda count=count: len(swept(ledger_path)) == count, 20)
    taken = [pooling.ask(worker, what, ticked.celery) for what in ("active", "reserved")]
    held = {one["id"] for listed in taken for one in listed if one["name"] == "ticked.hold"}
    assert len(held) == slots


def test_a_queue_that_is_cancelled_stays_so_until_it_is_added(
    start: Start, redis_server: devserver.Server, ledger_path: Path
) -> None:
    worker = start()
    node = [worker.node]
    assert pooling.ask(worker, "stats", ticked.celery)["gw_control"]["is_consumed"]
    ticked.celery.control.cancel_consumer(
        beat_tasks.QUEUE, destination=node, reply=True, timeout=15
    )
    eventually(lambda: not pooling.ask(worker, "stats", ticked.celery)["gw_control"]["is_consumed"])
    sweep()
    eventually(lambda: pooling.ready_pids(worker, ticked.celery), 20)
    ticked.hold.delay().get(timeout=20)
    assert (pooling.queued(redis_server, beat_tasks.QUEUE), swept(ledger_path)) == (1, [])
    ticked.celery.control.add_consumer(beat_tasks.QUEUE, destination=node, reply=True, timeout=15)
    eventually(lambda: len(swept(ledger_path)) == 1)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_stock_worker_can_run_them_for_the_others(
    start: Start, ledger_path: Path, pool: str
) -> None:
    listening = start(env={"LOAD": "300"})
    ticked.celery.control.cancel_consumer(
        beat_tasks.QUEUE, destination=[listening.node], reply=True, timeout=15
    )
    stock = start(pool=pool, queues=beat_tasks.QUEUE)
    sweep()
    eventually(lambda: age(listening) is not None, 20)
    ((pid, *_),) = swept(ledger_path)
    assert int(pid) in (stock.pid, *stock.children())
    assert pooling.ask(stock, "ping", ticked.celery), "by now it has heard the tick, too"
    assert "pidbox command error" not in stock.log_text()


def test_what_is_no_sweep_runs_where_plain_tasks_do(start: Start, ledger_path: Path) -> None:
    worker = start()
    eventually(lambda: pooling.ready_pids(worker, ticked.celery), 20)
    sent = ticked.celery.send_task("ticked.where", queue=beat_tasks.QUEUE)
    assert sent.get(timeout=20) in pooling.ready_pids(worker, ticked.celery)
    sweep()
    eventually(lambda: len(swept(ledger_path)) == 1)


def test_a_worker_with_beat_inside_ticks_for_itself(start: Start, tmp_path: Path) -> None:
    worker = start(env={"LOAD": "300"}, extra_args=["-B", "-s", str(tmp_path / "schedule")])
    eventually(lambda: age(worker) is not None, 20)


@pytest.mark.parametrize("late", ["", "1"])
def test_a_real_beat_has_the_entries_however_early_the_app_was_in_use(
    start_beat: StartBeat, late: str
) -> None:
    beat = start_beat(level="DEBUG", LATE=late, DECLARED="probe,benchmark")
    beat.wait_for_log(SENT)
    assert "gw_celery.benchmark_sweep" in beat.log_text().partition("Current schedule")[2]
    beat.stop()
    beat = start_beat(level="DEBUG", DECLARED="")
    beat.wait_for_log("Waking up")
    assert "gw_celery" not in beat.log_text().partition("Current schedule")[2]


def test_rabbitmq_brings_ticks_and_drops_what_nobody_took(
    start: Start,
    start_beat: StartBeat,
    ledger_path: Path,
    rabbitmq_url: str,
    result_url: str,
) -> None:
    with pooling.client(rabbitmq_url, result_url) as client:
        start_beat(broker=rabbitmq_url).wait_for_log(SENT, times=4)
        eventually(lambda: _waiting(client) in (1, 2), 20)
        worker = start(broker=rabbitmq_url, env={"LOAD": "300"})
        eventually(lambda: age(worker, app=client) is not None, 20)
        eventually(lambda: len(swept(ledger_path)) >= 2, 20)


def _waiting(client: Celery) -> int:
    """Messages of the sweeps that are in the broker."""
    with client.connection_for_read() as connection:
        return int(connection.default_channel.queue_declare(beat_tasks.QUEUE, passive=True)[1])
