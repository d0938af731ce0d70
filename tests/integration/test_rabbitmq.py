"""The same over RabbitMQ, with results in Redis and in RabbitMQ itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger
import pytest

from tests.processes import Process, StartWorker, eventually

pytestmark = pytest.mark.integration


@pytest.fixture(params=["redis", "rpc"])
def asking(
    request: pytest.FixtureRequest,
    rabbitmq_url: str,
    result_url: str,
    start_worker: StartWorker,
    ledger_path: Path,
    tmp_path: Path,
) -> Callable[[str], Process]:
    """Start a worker on RabbitMQ and return a function that starts a client of it."""
    result = result_url if request.param == "redis" else "rpc://"
    urls = {"CELERY_BROKER_URL": rabbitmq_url, "CELERY_RESULT_BACKEND": result}
    env = {**urls, "LEDGER": str(ledger_path)}
    start_worker("served:celery", broker=rabbitmq_url, result=result, env=env)

    def ask(what: str) -> Process:
        command = [sys.executable, "-m", "ask", what]
        return Process(command, tmp_path / f"{what}.log", env=env)

    return ask


def answer(client: Process) -> Any:
    assert client.wait_exit(60) == 0, client.log_text()
    return json.loads(client.log_text().splitlines()[-1])


def test_calls_are_answered_over_rabbitmq(asking: Callable[[str], Process]) -> None:
    assert answer(asking("everything")) == {
        "delay": 9,
        "remote": "negative",
        "awaited": [x * x for x in range(20)],
        "spawned": [x * x for x in range(5)],
        "spawned and got": 36,
        "got by another thread": 49,
        "chain": 16,
    }


def test_an_input_of_a_killed_child_is_delivered_again(
    asking: Callable[[str], Process], ledger_path: Path
) -> None:
    client = asking("record")
    (began,) = eventually(lambda: ledger.words(ledger_path, "began"))
    os.kill(int(began[0]), signal.SIGKILL)
    assert answer(client) == "survivor"
    assert len(ledger.words(ledger_path, "ended")) == 1
