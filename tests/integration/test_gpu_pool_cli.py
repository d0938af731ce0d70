"""``celery -A proj gw``: what operators type about workers with the GPU pool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pooled
import pytest

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, environment, eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def worker(start_worker: StartWorker, ledger_path: Path) -> WorkerProcess:
    return pooling.start(start_worker, ledger_path, replicas=2)


def gw(worker: WorkerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return celery(worker, "gw", *arguments)


def celery(worker: WorkerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person would, in a shell of its own."""
    command = [sys.executable, "-m", "celery", "-b", worker.broker_url, "-A", "pooled:celery"]
    return subprocess.run(
        [*command, *arguments],
        env=environment(),
        cwd=worker.log.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def status(worker: WorkerProcess) -> dict[str, Any]:
    done = gw(worker, "status", "--json", "-d", worker.node)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)[worker.node]
    return found


def states(worker: WorkerProcess) -> list[str]:
    return [one["state"] for one in status(worker)["replicas"]]


def test_status_shows_each_replica(worker: WorkerProcess) -> None:
    eventually(lambda: states(worker) == ["ready", "ready"], 20)
    found = status(worker)
    assert [one["pid"] for one in found["replicas"]] == pooling.ready_pids(worker)
    assert "cpu.four" in found["open_queues"]
    assert found["closed_queues"] == []
    shown = gw(worker, "status").stdout
    assert f"{worker.node}: 0 waiting" in shown
    for one in found["replicas"]:
        assert f"replica {one['number']}  ready     pid {one['pid']}" in shown


def test_a_drained_replica_stays_stopped_until_it_is_restarted(worker: WorkerProcess) -> None:
    running = pooled.four.delay("long", 1.5)
    eventually(lambda: pooling.ask(worker, "active"))
    assert gw(worker, "drain", "-d", worker.node).returncode == 0
    assert running.get(timeout=20) == "long"
    eventually(lambda: states(worker) == ["stopped", "stopped"], 30)
    assert status(worker)["open_queues"] == []
    waiting = pooled.four.delay("waits", 0.0)
    assert gw(worker, "restart", "1", "-d", worker.node).returncode == 0
    assert waiting.get(timeout=30) == "waits"
    # What it shows is the picture of the last tick.
    eventually(lambda: states(worker) == ["stopped", "ready"], 20)


def test_a_replica_that_is_not_there_is_refused_with_those_that_are(worker: WorkerProcess) -> None:
    done = gw(worker, "restart", "7")
    assert done.returncode == 1
    assert "there is no replica 7: this worker has replicas 0 to 1" in done.stdout


def test_celerys_own_commands_do_the_same(worker: WorkerProcess) -> None:
    eventually(lambda: states(worker) == ["ready", "ready"], 20)
    asked = celery(worker, "inspect", "gw_status", "--json", "-d", worker.node)
    assert asked.returncode == 0, asked.stderr
    shown = json.loads(asked.stdout)[worker.node]["replicas"]
    assert [one["pid"] for one in shown] == pooling.ready_pids(worker)
    assert celery(worker, "control", "-d", worker.node, "gw_drain", "1").returncode == 0
    eventually(lambda: states(worker) == ["ready", "stopped"], 20)
    assert celery(worker, "control", "-d", worker.node, "gw_restart").returncode == 0
    eventually(lambda: states(worker) == ["ready", "ready"], 20)


def test_no_worker_is_an_error_that_says_what_to_check(worker: WorkerProcess) -> None:
    done = gw(worker, "status", "-d", "absent@nowhere", "-t", "0.5")
    assert done.returncode == 1
    assert "no worker with the GPU pool answered within 0.5 s" in done.stderr
