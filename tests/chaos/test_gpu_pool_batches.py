"""Batches whose child dies, whose worker stops, or whose inputs are bad: each input is counted."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import gathered
import ledger
import pytest
from celery import group
from celery.exceptions import TimeLimitExceeded

from gw_celery import errors, testing
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(16)]


def sent(method: Any, names: list[str], *args: Any) -> list[Any]:
    return group(method.s(name, *args) for name in names).apply_async().results


def start(start_pooled: StartPooled, **given: Any) -> WorkerProcess:
    return start_pooled(module="gathered", queues="cpu", **given)


def calls(path: Path) -> list[list[str]]:
    return [line[4:] for line in ledger.words(path, "called")]


def test_a_batch_that_kills_the_child_has_its_suspects_run_alone_and_the_others_succeed(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    start(start_pooled, settings={"gw_max_deaths": 2})
    good = [f"w{number}" for number in range(12)]
    results = sent(gathered.Fragile().judge, [*good, "kill"])
    assert [one.get(timeout=60) for one in results[:-1]] == good
    with pytest.raises(errors.PoisonedInput):
        results[-1].get(timeout=60)
    first, *rest = calls(ledger_path)
    assert len(first) == 13
    # Its first death was in company, and does not count.
    assert rest.count(["kill"]) == 2
    assert all(len(one) == 1 for one in rest)


def test_what_gathered_in_a_child_that_dies_starts_elsewhere_and_is_no_suspect(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start(start_pooled)
    waiting = sent(gathered.Patient().gather, NAMES[:7])
    eventually(lambda: pooling.in_flight(worker, gathered.celery) == 7)
    (pid,) = eventually(lambda: pooling.ready_pids(worker, gathered.celery))
    os.kill(pid, signal.SIGKILL)
    last = gathered.Patient().gather.delay("last")
    assert [one.get(timeout=60) for one in [*waiting, last]] == [*NAMES[:7], "last"]
    assert [len(one) for one in calls(ledger_path)] == [8]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT])
def test_a_worker_that_stops_gives_back_what_has_not_begun(
    how: signal.Signals,
    start_pooled: StartPooled,
    ledger_path: Path,
    redis_server: testing.Server,
) -> None:
    worker = start(start_pooled)
    waiting = sent(gathered.Patient().gather, NAMES[:7])
    eventually(lambda: pooling.in_flight(worker, gathered.celery) == 7)
    worker.signal(how)
    assert worker.wait_exit(20) == 0
    assert not calls(ledger_path)
    assert pooling.queued(redis_server, "cpu.Patient") == 7
    start(start_pooled)
    last = gathered.Patient().gather.delay("last")
    assert [one.get(timeout=60) for one in [*waiting, last]] == [*NAMES[:7], "last"]
    assert pooling.counts(ledger_path, NAMES[:7]) == pooling.all_once(NAMES[:7])


@pytest.mark.parametrize("method", ["rest", "compute"])
def test_a_call_that_never_ends_does_not_keep_its_method_from_others(
    method: str, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start(start_pooled)
    (first,) = eventually(lambda: pooling.ready_pids(worker, gathered.celery))
    bound = getattr(gathered.Model(), method)
    hanging = bound.apply_async(("hangs", 3600.0), time_limit=2)
    eventually(lambda: pooling.began(ledger_path, "hangs"))
    waiting = [bound.delay(name) for name in NAMES[:3]]
    with pytest.raises(TimeLimitExceeded):
        hanging.get(timeout=20)
    assert [one.get(timeout=60) for one in waiting] == NAMES[:3]
    assert pooling.counts(ledger_path, NAMES[:3]) == pooling.all_once(NAMES[:3])
    # An asynchronous body is cancelled; a thread cannot be ended, and its process is replaced.
    (last,) = eventually(lambda: pooling.ready_pids(worker, gathered.celery), 20)
    assert (last == first) == (method == "rest")


def test_a_warm_shutdown_finishes_the_batch_that_runs_and_leaves(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start(start_pooled)
    running = sent(gathered.Busy().rest, ["running"], 2.0)
    eventually(lambda: pooling.began(ledger_path, "running"))
    waiting = sent(gathered.Busy().rest, NAMES[:3])
    eventually(lambda: pooling.in_flight(worker, gathered.celery) == 4)
    worker.signal(signal.SIGTERM)
    assert worker.wait_exit(20) == 0
    assert running[0].get(timeout=5) == "running"
    assert calls(ledger_path) == [["running"]]
    start(start_pooled)
    assert [one.get(timeout=60) for one in waiting] == NAMES[:3]


def test_a_replica_that_drains_runs_what_gathered_at_once(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start(start_pooled)
    waiting = sent(gathered.Patient().gather, NAMES[:7])
    eventually(lambda: pooling.in_flight(worker, gathered.celery) == 7)
    pooling.tell(worker, "gw_drain", replica=0)
    assert [one.get(timeout=20) for one in waiting] == NAMES[:7]
    ((_, _, _, flush, *_),) = ledger.words(ledger_path, "called")
    assert flush == "drain"


def test_a_killed_child_has_each_input_of_its_batch_run_again_once_without_waiting_for_others(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    """They run alone: the wait for others, ten minutes here, would be for nothing."""
    start(start_pooled)
    names = ["slow", *NAMES[:7]]
    results = sent(gathered.Patient().gather, names)
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 8)
    os.kill(pooling.began(ledger_path, "slow")[0], signal.SIGKILL)
    assert [one.get(timeout=60) for one in results] == names
    assert [len(one) for one in calls(ledger_path)] == [8, *[1] * 8]
    assert pooling.counts(ledger_path, names) == pooling.all_once(names, started_twice=8)
