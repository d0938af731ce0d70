"""Bodies that would take a worker, or their neighbours, down with them on the GPU pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ledger
import pooled
import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from gw_celery import errors
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(3)]


def start_with_neighbours(
    start_pooled: StartPooled, ledger_path: Path, seconds: float = 1.0, **given: Any
) -> tuple[WorkerProcess, int, list[Any]]:
    """A worker, its child that the test is about, and three inputs in flight in that child."""
    worker = start_pooled(**given)
    pid = pooling.ready_pid(worker)
    sent = [pooled.four.delay(name, seconds) for name in NAMES]
    eventually(lambda: all(pooling.began(ledger_path, name) for name in NAMES))
    return worker, pid, sent


BODIES = [
    pytest.param(pooled.misbehave, id="async"),
    pytest.param(pooled.Desk().misbehave, id="sync"),
    pytest.param(pooled.plain_misbehave, id="plain"),
]


@pytest.mark.parametrize("body", BODIES)
def test_what_a_body_raises_fails_that_body_alone(
    body: Any, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker, pid, beside = start_with_neighbours(start_pooled, ledger_path)
    raised = ("exit", "interrupt", "panic", "group", "close", "cancel")
    sent = {how: body.delay(how, how) for how in (*raised, "odd")}
    failed = {how: one.get(timeout=20, propagate=False) for how, one in sent.items()}
    assert {how: type(failed[how]) for how in raised} == dict.fromkeys(raised, errors.BodyExited)
    assert all("misdeeds.py" in sent[how].traceback for how in raised)
    assert isinstance(failed["odd"], Exception)
    assert [len(pooling.began(ledger_path, how)) for how in sent] == [1] * len(sent)
    assert [one.get(timeout=20) for one in beside] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    # The model is not loaded again for it.
    assert pooling.ready_pid(worker) == pid


@pytest.mark.parametrize("body", BODIES)
def test_a_child_that_ran_out_of_memory_is_replaced_and_the_worker_lives(
    body: Any, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker, pid, beside = start_with_neighbours(start_pooled, ledger_path)
    sent = body.delay("memory", "memory")
    with pytest.raises(MemoryError):
        sent.get(timeout=20)
    assert [one.get(timeout=20) for one in beside] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    eventually(lambda: pooling.ready_pids(worker) not in ([], [pid]), 20)
    assert len(pooling.began(ledger_path, "memory")) == 1
    assert worker.exit_code is None


@pytest.mark.parametrize("how", ["gil", "block"])
def test_a_body_that_stops_its_child_ends_at_its_hard_limit(
    how: str, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker, pid, beside = start_with_neighbours(
        start_pooled, ledger_path, 1.5, settings={"gw_heartbeat_timeout": 3.0}
    )
    sent = pooled.misbehave.apply_async((how, "stuck", 60.0), time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=10)
    assert [one.get(timeout=30) for one in beside] == NAMES
    counts = pooling.counts(ledger_path, NAMES)
    assert (counts["finished once"], counts["lost"]) == (3, 0)
    assert len(pooling.began(ledger_path, "stuck")) == 1
    eventually(lambda: pooling.ready_pids(worker) not in ([], [pid]), 20)


@pytest.mark.parametrize("how", ["gil", "regex"])
def test_a_body_that_stops_its_child_without_a_limit_is_given_up(
    how: str, start_pooled: StartPooled, ledger_path: Path
) -> None:
    _, _, beside = start_with_neighbours(
        start_pooled, ledger_path, settings={"gw_heartbeat_timeout": 2.0, "gw_max_deaths": 1}
    )
    sent = pooled.misbehave.delay(how, "stuck", 600.0)
    with pytest.raises(errors.PoisonedInput):
        sent.get(timeout=40)
    assert [one.get(timeout=30) for one in beside] == NAMES
    counts = pooling.counts(ledger_path, NAMES)
    assert (counts["finished once"], counts["lost"]) == (3, 0)
    # Once beside the others, and once alone.
    assert len(pooling.began(ledger_path, "stuck")) == 2


def test_a_worker_with_a_stopped_child_answers_control(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    sent = pooled.misbehave.delay("gil", "stuck", 3.0)
    eventually(lambda: pooling.began(ledger_path, "stuck"))
    assert pooling.ask(worker, "ping") == {"ok": "pong"}
    assert [one["id"] for one in pooling.ask(worker, "active")] == [sent.id]
    assert sent.get(timeout=20) is None


def test_a_child_that_writes_garbage_is_killed_and_the_worker_lives(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker, _, beside = start_with_neighbours(
        start_pooled, ledger_path, settings={"gw_max_deaths": 1}
    )
    sent = pooled.misbehave.delay("garbage", "garbage")
    assert [one.get(timeout=40) for one in beside] == NAMES
    with pytest.raises(errors.PoisonedInput):
        sent.get(timeout=40)
    assert "is killed: it wrote garbage" in worker.log_text()
    assert pooled.add.delay(1).get(timeout=20) == 2
    counts = pooling.counts(ledger_path, NAMES)
    assert (counts["finished once"], counts["lost"]) == (3, 0)


@pytest.mark.parametrize("stop", ["limit", "revoke"])
def test_stopping_one_of_four_leaves_the_three(
    stop: str, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker, pid, beside = start_with_neighbours(start_pooled, ledger_path, 2.0)
    options = {"time_limit": 0.5} if stop == "limit" else {}
    sent = pooled.four.apply_async(
        ("fourth", 30.0), link_error=pooled.note.s(name="fourth"), **options
    )
    eventually(lambda: pooling.began(ledger_path, "fourth"))
    if stop == "revoke":
        sent.revoke(terminate=True)
    with pytest.raises((TimeLimitExceeded, TaskRevokedError)):
        sent.get(timeout=10)
    assert [one.get(timeout=20) for one in beside] == NAMES
    assert pooling.counts(ledger_path, [*NAMES, "fourth"]) == {
        "sent": 4, "finished once": 3, "finished twice": 0, "started twice": 0, "lost": 1
    }  # fmt: skip
    assert pooling.ready_pid(worker) == pid
    if stop == "limit":
        eventually(lambda: pooling.wrote(ledger_path, "errback", "fourth"))
    assert pooling.wrote(ledger_path, "errback", "fourth") == (stop == "limit")
    assert len(ledger.words(ledger_path, "cancelled")) == 1
