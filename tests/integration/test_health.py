"""What a platform asks of a real worker: its file, and its endpoint."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests import pooling
from tests.outages import outage
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually, workers

pytestmark = pytest.mark.integration

PATHS = ("/livez", "/readyz", "/startupz")


def address(worker: WorkerProcess) -> str:
    found = eventually(lambda: re.search(r"health is at (\S+)/livez", worker.log_text()), 20)
    return str(found[1])


def ask(worker: WorkerProcess, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(address(worker) + path, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def statuses(worker: WorkerProcess) -> list[int]:
    return [ask(worker, path)[0] for path in PATHS]


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def test_a_worker_is_alive_while_it_loads_and_ready_when_it_has(
    start_pooled: StartPooled, tmp_path: Path
) -> None:
    file = tmp_path / "alive"
    settings = {"gw_health_port": 0, "gw_heartbeat_file": str(file)}
    worker = start_pooled(settings=settings, is_loaded=False, env={"LOAD": "6"})
    assert address(worker).startswith("http://127.0.0.1:")
    eventually(lambda: ask(worker, "/startupz")[1]["replicas"], 20)
    assert statuses(worker) == [200, 503, 503]
    (one,) = ask(worker, "/readyz")[1]["replicas"]
    assert re.match(r"(starting|entering) for \d s", one["why"])
    eventually(lambda: statuses(worker) == [200, 200, 200], 30)
    assert age(file) < 20
    pooling.tell(worker, "gw_drain")
    eventually(lambda: statuses(worker) == [200, 503, 200], 20)
    worker.stop()
    assert not file.exists()


def test_a_worker_that_is_frozen_leaves_an_old_file(
    start_pooled: StartPooled, tmp_path: Path
) -> None:
    file = tmp_path / "alive"
    worker = start_pooled(settings={"gw_heartbeat_file": str(file)}, is_loaded=False)
    eventually(lambda: file.exists() and age(file) < 3, 20)
    worker.signal(signal.SIGSTOP)
    assert eventually(lambda: age(file) > 5, 20)
    worker.signal(signal.SIGCONT)
    assert eventually(lambda: age(file) < 3, 20)


def test_a_worker_whose_broker_is_away_is_alive_and_not_ready(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    settings = {
        "gw_health_port": 0,
        "gw_heartbeat_file": str(file),
        "gw_heartbeat_timeout": 3,
    }
    with outage(tmp_path / "broker") as broker:
        urls = (broker.server.broker_url, broker.server.result_url)
        with workers(tmp_path, *urls) as start_worker:
            worker = pooling.start(start_worker, tmp_path / "ledger", settings=settings)
            eventually(lambda: statuses(worker) == [200] * 3, 20)
            broker.stop()
            eventually(lambda: worker.log_text().count("Trying again") >= 3, 40)
            status, said = ask(worker, "/livez")
            assert (status, said["ok"]) == (200, True)
            assert "connects to the broker" in said["why"][0]
            status, said = ask(worker, "/readyz")
            assert (status, said["ok"]) == (503, False)
            assert "no connection to the broker" in said["why"][-1]
            assert age(file) < 5
            broker.start()
            assert eventually(lambda: statuses(worker) == [200] * 3, 20)


def test_a_port_in_use_ends_the_worker_at_its_start_with_the_remedy(
    start_pooled: StartPooled,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = start_pooled(settings={"gw_health_port": port}, wait_ready=False, is_loaded=False)
        eventually(lambda: worker.exit_code is not None, 30)
    assert worker.exit_code != 0
    assert f"gw_health_port={port}: cannot listen on 127.0.0.1" in worker.log_text()
    assert "Traceback" not in worker.log_text()
