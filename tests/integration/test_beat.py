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

from gw_celery import testing
from tests import pooling
from tests.processes import Process, StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

PROBE = "gw_celery.probe_sweep"
QUEUE = "gw.control"
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


def sweep(name: str = PROBE, **options: Any) -> Any:
    return ticked.celery.send_task(name, queue=QUEUE, ignore_result=True, **options)


def test_every_worker_hears_every_tick_and_a_replica_sends_it(
    start: Start, start_beat: StartBeat, redis_server: testing.Server, ledger_path: Path
) -> None:
    listening = [start(), start(env={"LOAD": "300"})]
    beat = start_beat(SETTINGS=json.dumps({"gw_benchmark_period": 2}), DECLARED="probe,benchmark")
    beat.wait_for_log(SENT, times=2)
    for worker in listening:
        for kind in ("probe", "benchmark"):
            eventually(lambda worker=worker, kind=kind: age(worker, kind) is not None, 20)
    ready, loading = (pooling.ready_pids(worker, ticked.celery) for worker in listening)
    assert loading == [], "it hears a tick without a READY replica, and sends none"
    eventually(lambda: len(swept(ledger_path)) >= 4, 20)
    assert {int(line[0]) for line in swept(ledger_path)} <= set(ready)
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as results:
        assert results.keys("celery-task-meta-*") == []
    for worker in listening:
        assert "raised" not in worker.log_text()


def test_ticks_that_expired_while_no_worker_listened_are_not_run(
    start: Start, redis_server: testing.Server, ledger_path: Path
) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    stale = [sweep(expires=past) for _ in range(5)]
    worker = start()
    live = sweep()
    eventually(lambda: len(swept(ledger_path)) == 1, 20)
    worker.wait_for_log(f"{live.id}] succeeded")
    for one in stale:
        assert f"Discarding revoked task: {PROBE}[{one.id}]" in worker.log_text()
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as results:
        assert results.keys("celery-task-meta-*") == []


def test_a_full_worker_takes_no_input_more_and_runs_a_tick_when_a_slot_is_free(
    start: Start, redis_server: testing.Server, ledger_path: Path
) -> None:
    worker = start(queues="cpu.hold", env={"DECLARED": "benchmark"})
    eventually(lambda: pooling.ready_pids(worker, ticked.celery), 20)
    for _ in range(4):
        ticked.hold.delay(seconds=8.0)
    eventually(lambda: len(pooling.ask(worker, "active", ticked.celery)) == 1)
    sweep()
    assert pooling.ask(worker, "reserved", ticked.celery) == []
    assert pooling.queued(redis_server, "cpu.hold") == 3
    assert (pooling.queued(redis_server, QUEUE), swept(ledger_path)) == (1, [])
    eventually(lambda: len(swept(ledger_path)) == 1, 40)
    assert pooling.queued(redis_server, "cpu.hold") > 0, "it waits for one input, not for all"


def test_a_tick_is_no_input_that_a_replica_is_kept_or_replaced_for(
    start: Start, ledger_path: Path
) -> None:
    worker = start(extra_args=["--max-tasks-per-child", "2"])
    pids = eventually(lambda: pooling.ready_pids(worker, ticked.celery), 20)
    for count in range(1, 5):
        sweep()
        eventually(lambda count=count: len(swept(ledger_path)) == count, 20)
    ticked.hold.delay().get(timeout=20)
    assert pooling.ready_pids(worker, ticked.celery) == pids
    tallies = pooling.ask(worker, "stats", ticked.celery)["pool"]["gw_tallies"]
    assert "" not in tallies


def test_a_queue_that_is_cancelled_stays_so_until_it_is_added(
    start: Start, redis_server: testing.Server, ledger_path: Path
) -> None:
    worker = start()
    pooling.wait_loaded(worker)
    eventually(lambda: QUEUE in consumed(worker), 20)
    command = {"destination": [worker.node], "reply": True, "timeout": 15}
    ticked.celery.control.cancel_consumer(QUEUE, **command)
    eventually(lambda: QUEUE not in consumed(worker))  # the worker answers before it cancels
    sweep()
    ticked.hold.delay().get(timeout=20)
    assert (pooling.queued(redis_server, QUEUE), swept(ledger_path)) == (1, [])
    ticked.celery.control.add_consumer(QUEUE, **command)
    eventually(lambda: len(swept(ledger_path)) == 1)


def consumed(worker: WorkerProcess) -> set[str]:
    return {queue["name"] for queue in pooling.ask(worker, "active_queues", ticked.celery)}


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_stock_worker_can_run_them_for_the_others(
    start: Start, ledger_path: Path, pool: str
) -> None:
    listening = start(env={"LOAD": "300"})
    stock = start(pool=pool, queues=QUEUE)
    sweep()
    eventually(lambda: age(listening) is not None, 20)
    ((pid, *_),) = swept(ledger_path)
    assert int(pid) in (stock.pid, *stock.children())
    assert pooling.ask(stock, "ping", ticked.celery), "by now it has heard the tick, too"
    assert "pidbox command error" not in stock.log_text()


def test_a_worker_with_beat_inside_ticks_for_itself(start: Start, tmp_path: Path) -> None:
    worker = start(extra_args=["-B", "-s", str(tmp_path / "schedule")])
    assert eventually(lambda: age(worker) is not None, 20)


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


def test_rabbitmq_brings_ticks_and_drops_those_that_were_not_taken(
    start: Start,
    start_beat: StartBeat,
    ledger_path: Path,
    rabbitmq_url: str,
    result_url: str,
) -> None:
    with pooling.client(rabbitmq_url, result_url) as client:
        start_beat(broker=rabbitmq_url).wait_for_log(SENT, times=4)
        assert eventually(lambda: _waiting(client) in (1, 2), 20)
        worker = start(broker=rabbitmq_url)
        eventually(lambda: age(worker, app=client) is not None, 20)
        assert eventually(lambda: len(swept(ledger_path)) >= 2, 20)


def _waiting(client: Celery) -> int:
    """Messages of the sweeps that are in the broker."""
    with client.connection_for_read() as connection:
        return int(connection.default_channel.queue_declare(QUEUE, passive=True)[1])
