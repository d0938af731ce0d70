"""Workers of different speed on RabbitMQ, which know each other's scores from their records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(start_worker: StartWorker, ledger_path: Path, rabbitmq_url: str) -> Start:
    def start_one(nap: float, result: str) -> WorkerProcess:
        return pooling.start(
            start_worker,
            ledger_path,
            broker=rabbitmq_url,
            result=result,
            module="paced",
            queues="cpu.step",
            env={"NAP": str(nap)},
        )

    return start_one


def bands(worker: WorkerProcess, app: Any) -> Any:
    return app.control.inspect([worker.node], timeout=15, limit=1)._request("gw_status")[
        worker.node
    ]["bands"]


def test_the_quicker_of_two_workers_is_quick_and_the_other_is_slow(
    start: Start, rabbitmq_url: str, result_url: str
) -> None:
    slow, quick = start(0.4, result_url), start(0.02, result_url)
    with pooling.client(rabbitmq_url, result_url) as app:
        eventually(lambda: bands(slow, app) == {"paced.step": "slow"}, 30)
        assert bands(quick, app) == {"paced.step": "quick"}
        assert "paced.step: this worker is slow beside the others" in slow.log_text()
        quick.kill()
        # When the quick one is lost, the slow one is the best that there is.
        eventually(lambda: bands(slow, app) == {"paced.step": "quick"}, 30)


def test_without_a_redis_there_are_no_bands_and_a_worker_says_that_it_stands_alone(
    start: Start, rabbitmq_url: str
) -> None:
    worker = start(0.02, "rpc://")
    with pooling.client(rabbitmq_url, "rpc://") as app:
        assert bands(worker, app) == {}
    assert worker.log_text().count("this worker stands alone") == 1
