"""How a worker on the GPU pool ends, and what becomes of the inputs that it has taken."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import ledger
import pooled
import pytest
from celery import states

from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually, is_alive

pytestmark = pytest.mark.integration

NAMES = [f"n{number}" for number in range(8)]


def wait_for_active(worker: WorkerProcess, count: int) -> None:
    """Wait until the worker knows of so many inputs that they run."""
    eventually(lambda: len(pooling.ask(worker, "active")) == count, 20)


def send(worker: WorkerProcess, body: Any, seconds: float) -> list[Any]:
    """Eight inputs, of which four run."""
    sent = [body.delay(name, seconds) for name in NAMES]
    wait_for_active(worker, 4)
    return sent


BODIES = [
    pytest.param(pooled.four, id="async"),
    pytest.param(pooled.early, id="early"),
    pytest.param(pooled.Desk().sit, id="sync"),
]


@pytest.mark.parametrize("body", BODIES)
def test_a_warm_shutdown_ends_what_runs_and_gives_back_the_rest(
    body: Any, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = send(worker, body, 1.0)
    assert worker.stop() == 0
    assert len(ledger.words(ledger_path, "ended")) == 4
    start_pooled()
    assert [one.get(timeout=20) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    assert pooling.wrote(ledger_path, "left", "Model") == 1


def test_a_term_for_the_whole_process_group_is_a_warm_shutdown(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = send(worker, pooled.four, 1.0)
    os.killpg(worker.pid, signal.SIGTERM)
    assert worker.wait_exit(20) == 0
    start_pooled()
    assert [one.get(timeout=20) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_limits_hold_while_a_worker_stops(start_pooled: StartPooled, ledger_path: Path) -> None:
    worker = start_pooled()
    soft = pooled.four.apply_async(("soft", 30.0), soft_time_limit=1.5)
    hard = pooled.four.apply_async(("hard", 30.0), time_limit=1.5)
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 2)
    assert worker.stop() == 0
    assert soft.get(timeout=5) == "soft"
    assert hard.state == states.FAILURE


def test_a_worker_that_cannot_end_its_inputs_gives_them_back_at_its_deadline(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"gw_shutdown_timeout": 1.0})
    sent = pooled.four.delay("long", 3.0)
    eventually(lambda: pooling.began(ledger_path, "long"))
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    worker.wait_exit(10)
    assert time.monotonic() - began < 2.9
    start_pooled()
    assert sent.get(timeout=20) == "long"
    assert len(pooling.began(ledger_path, "long")) == 2


@pytest.mark.parametrize("body", [BODIES[0], BODIES[2]])
def test_a_cold_shutdown_gives_everything_back(
    body: Any, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = send(worker, body, 2.0)
    children = worker.children()
    began = time.monotonic()
    worker.signal(signal.SIGQUIT)
    worker.wait_exit(10)
    assert time.monotonic() - began < 5
    assert ledger.words(ledger_path, "ended") == []
    eventually(lambda: not any(map(is_alive, children)))
    start_pooled()
    assert [one.get(timeout=20) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES, started_twice=4)


def test_a_cold_shutdown_waits_for_nothing_that_has_not_begun(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    blocking = pooled.misbehave.delay("block", "blocking", 3.0)
    wait_for_active(worker, 1)
    # It reaches the child, whose loop is blocked: it is taken, and not begun.
    sent = pooled.four.delay("behind", 10.0)
    eventually(lambda: sent.id in [one["id"] for one in pooling.ask(worker, "reserved")])
    began = time.monotonic()
    worker.signal(signal.SIGQUIT)
    worker.wait_exit(15)
    assert time.monotonic() - began < 5
    start_pooled()
    assert sent.get(timeout=20) == "behind"
    blocking.forget()


def test_a_cold_shutdown_answers_what_was_acknowledged_early(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = [pooled.early.delay(name, 30.0) for name in NAMES[:4]]
    wait_for_active(worker, 4)
    worker.signal(signal.SIGQUIT)
    worker.wait_exit(10)
    # They are not run again: a caller must not wait for ever.
    assert [one.state for one in sent] == [states.FAILURE] * 4


def test_a_soft_shutdown_lets_what_runs_end_in_its_time(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"worker_soft_shutdown_timeout": 3.0})
    sent = send(worker, pooled.four, 1.0)
    worker.signal(signal.SIGQUIT)
    worker.wait_exit(15)
    start_pooled()
    assert [one.get(timeout=20) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_limits_hold_during_a_soft_shutdown(start_pooled: StartPooled, ledger_path: Path) -> None:
    worker = start_pooled(settings={"worker_soft_shutdown_timeout": 4.0})
    sent = pooled.four.apply_async(("limited", 30.0), time_limit=1.0)
    wait_for_active(worker, 1)
    worker.signal(signal.SIGQUIT)
    worker.wait_exit(15)
    assert sent.state == states.FAILURE


def test_every_replica_leaves_its_contexts_and_no_process_stays(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2)
    sent = pooled.four.delay("running", 1.0)
    eventually(lambda: pooling.began(ledger_path, "running"))
    children = worker.children()
    assert len(children) >= 2
    assert worker.stop() == 0
    assert sent.get(timeout=5) == "running"
    assert pooling.wrote(ledger_path, "left", "Model") == 2
    assert not any(map(is_alive, children))


def test_a_worker_told_to_shut_down_by_control_ends_warm(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = pooled.four.delay("running", 1.0)
    eventually(lambda: pooling.began(ledger_path, "running"))
    pooled.celery.control.shutdown(destination=[worker.node])
    assert worker.wait_exit(15) == 0
    assert sent.get(timeout=5) == "running"
