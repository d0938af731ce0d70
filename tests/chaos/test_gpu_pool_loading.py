"""Loads of the GPU pool that fail, hang or take their time: no message is taken meanwhile."""

from __future__ import annotations

from pathlib import Path

import pooled
import pytest

from gw_celery import testing
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(3)]
REASONS = {
    "raise": "the weights are not there",
    "exit": "exitcode 7",
    "hang": "(setting gw_start_timeout)",
    "signal": "the receiver cannot",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_child_that_cannot_load_is_tried_again_and_takes_nothing(
    how: str, start_pooled: StartPooled, ledger_path: Path, redis_server: testing.Server
) -> None:
    sent = [pooled.four.delay(name) for name in NAMES]
    worker = start_pooled(env={"FAIL": how}, settings={"gw_start_timeout": 1.0}, is_loaded=False)
    eventually(lambda: pooling.replicas(worker)[0]["restarts"] >= 2, 40)
    assert REASONS[how] in pooling.replicas(worker)[0]["last_error"]
    assert pooling.wrote(ledger_path, "entering", "Model") >= 2
    assert pooling.ask(worker, "ping") == {"ok": "pong"}
    assert pooling.ask(worker, "active_queues") == []
    assert pooling.queued(redis_server, "cpu.four") == 3
    assert worker.stop() == 0
    assert not any(one.ready() for one in sent)
    start_pooled()
    assert [one.get(timeout=20) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_a_model_that_loads_at_the_third_try_is_served(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    sent = [pooled.four.delay(name) for name in NAMES]
    start_pooled(env={"FAIL": "raise", "FAILS": "2"})
    assert [one.get(timeout=30) for one in sent] == NAMES
    assert pooling.wrote(ledger_path, "entering", "Model") == 3
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_one_replica_that_cannot_load_does_not_stop_the_other(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2, env={"FAIL": "raise", "FAILS": "1"}, is_loaded=False)
    assert pooled.four.delay("served").get(timeout=30) == "served"
    eventually(lambda: len(pooling.ready_pids(worker)) == 2, 20)


def test_a_program_that_cannot_be_imported_is_said(
    start_pooled: StartPooled, redis_server: testing.Server
) -> None:
    sent = pooled.four.delay("waits")
    worker = start_pooled(env={"BREAK_IN_CHILD": "1"}, is_loaded=False)
    eventually(lambda: pooling.replicas(worker)[0]["restarts"] >= 1, 20)
    assert "this module cannot be imported twice" in pooling.replicas(worker)[0]["last_error"]
    assert pooling.queued(redis_server, "cpu.four") == 1
    assert worker.stop() == 0
    sent.forget()
