"""What Celery users do every day, on the GPU pool: start processes, autoscale, send odd headers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pooled
import pytest

from gw_celery import errors
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import eventually

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("forks", [False, True])
def test_a_body_can_terminate_the_processes_that_it_starts(
    forks: bool, start_pooled: StartPooled
) -> None:
    start_pooled()
    ended = pooled.plain_terminates.delay(forks=forks).get(timeout=20)
    assert ended == -signal.SIGTERM


def test_the_prefetch_count_follows_the_slots_that_are_ready(start_pooled: StartPooled) -> None:
    worker = start_pooled()
    one = pooling.ask(worker, "stats")["prefetch_count"]

    def prefetch() -> Any:
        return pooling.ask(worker, "stats")["prefetch_count"]

    pooling.tell(worker, "pool_grow", n=one)
    eventually(lambda: len(pooling.ready_pids(worker)) == 2, 20)
    eventually(lambda: prefetch() == 2 * one)
    pooling.tell(worker, "pool_shrink", n=one)
    eventually(lambda: len(pooling.replicas(worker)) == 1, 20)
    eventually(lambda: prefetch() == one)
    assert worker.exit_code is None


def test_the_autoscaler_starts_no_more_replicas_than_its_maximum(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    one = pooling.ask(worker, "stats")["pool"]["max-concurrency"]
    worker.stop()
    # Without a number of replicas, the autoscaler's minimum says how many there are.
    scale = ["--autoscale", f"{2 * one},{one}", "--prefetch-multiplier", "4"]
    worker = start_pooled(
        replicas=None, env={"LOAD": "3"}, extra_args=scale, is_loaded=False, concurrency=one
    )
    names = [f"n{number}" for number in range(30)]
    sent = [pooled.four.delay(name, 0.3) for name in names]
    most = 0
    for one_sent in sent:
        assert one_sent.get(timeout=40) in names
        most = max(most, len(pooling.replicas(worker)))
    assert 1 <= most <= 2
    assert pooling.wrote(ledger_path, "entering", "Model") <= 1 + 2


@pytest.mark.parametrize("limits", [["a", "b"], [None, "1"], [float("inf"), None], [10**400, None]])
def test_an_odd_time_limit_fails_its_input_and_no_worker(
    limits: list[Any], start_pooled: StartPooled
) -> None:
    worker = start_pooled()
    odd = pooled.plain.apply_async((1,), headers={"timelimit": limits})
    with pytest.raises(errors.UsageError, match="send seconds"):
        odd.get(timeout=20)
    assert pooled.plain.delay(1).get(timeout=20) is not None
    assert worker.exit_code is None
