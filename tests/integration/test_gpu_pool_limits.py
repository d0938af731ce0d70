"""Limits, revocation and expiry on the GPU pool: one input is stopped, its neighbours go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pooled
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from gw_celery import testing
from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    with pooling.module_worker(
        redis_server, tmp_path_factory, extra_args=["-E"], settings={"gw_drain_timeout": 5.0}
    ) as started:
        yield started


@pytest.fixture
def ledger_path(worker: WorkerProcess) -> Path:
    return pooling.ledger_of(worker)


@pytest.fixture
def neighbours(worker: WorkerProcess, ledger_path: Path) -> Iterator[None]:
    """Inputs of the same child that run through whatever the test does to another one."""
    pid = pooling.ready_pid(worker)
    name = f"neighbour{len(ledger_path.read_text())}"
    sent = pooled.hold.delay(name, 2.5)
    eventually(lambda: pooling.began(ledger_path, name) == [pid])
    yield
    assert sent.get(timeout=30) == name
    assert pooling.began(ledger_path, name) == [pid]


Body = Callable[..., Any]
BODIES = [
    pytest.param(pooled.four, id="async"),
    pytest.param(pooled.Desk().sit, id="sync"),
    pytest.param(pooled.plain_rest, id="plain"),
]
SERVED = BODIES[:2]
#: Celery 5.6 does not report a task that its time-out callback fails: no event, no signal.
FAILURE_EVENTS = int(celery.VERSION[:2] >= (5, 7))


@pytest.mark.parametrize("body", SERVED)
def test_a_soft_limit_is_raised_in_the_body(
    body: Any, neighbours: None, ledger_path: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    sent = body.apply_async((name, 30.0), soft_time_limit=0.5)
    assert sent.get(timeout=10) == "soft"
    assert pooling.wrote(ledger_path, "softly", name) == 1


def test_a_soft_limit_that_is_not_caught_fails_the_input(neighbours: None) -> None:
    sent = pooled.plain_rest.apply_async(("plain soft", 3.0), soft_time_limit=0.5)
    with pytest.raises(SoftTimeLimitExceeded):
        sent.get(timeout=20)
    assert pooled.plain.delay(1).get(timeout=10) == 2


@pytest.mark.parametrize("body", BODIES)
def test_a_hard_limit_fails_the_input_once(
    body: Any, neighbours: None, ledger_path: Path, worker: WorkerProcess, request: Any
) -> None:
    name = request.node.name
    with pooling.events("task-failed") as failed:
        sent = body.apply_async((name, 1.3), time_limit=0.5, link_error=pooled.note.s(name=name))
        with pytest.raises(TimeLimitExceeded):
            sent.get(timeout=10)
        # The errback is a plain task; so is this one, which ends after it.
        assert pooled.plain.delay(1).get(timeout=10) == 2
        eventually(lambda: pooling.wrote(ledger_path, "errback", name))
        assert pooling.ask(worker, "active") is not None
        eventually(lambda: failed.count(sent.id) == FAILURE_EVENTS)
    assert failed.count(sent.id) == FAILURE_EVENTS
    assert pooling.wrote(ledger_path, "errback", name) == 1
    assert sent.state == "FAILURE"


def test_a_hard_limit_cancels_an_asynchronous_body(neighbours: None, ledger_path: Path) -> None:
    sent = pooled.four.apply_async(("hard", 30.0), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=10)
    eventually(lambda: pooling.wrote(ledger_path, "cancelled", "hard"))


def test_the_child_of_a_body_that_does_not_go_is_replaced_after_its_neighbours(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    pid = pooling.ready_pid(worker)
    neighbour = pooled.hold.delay("beside", 3.0)
    eventually(lambda: pooling.began(ledger_path, "beside"))
    sent = pooled.misbehave.apply_async(("swallow", "stays", 60.0), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=10)
    assert neighbour.get(timeout=20) == "beside"
    assert pooling.began(ledger_path, "beside") == [pid]
    eventually(lambda: pooling.ready_pids(worker) not in ([], [pid]), 20)
    assert sent.state == "FAILURE"
    assert pooled.add.delay(1).get(timeout=20) == 2


def test_the_child_of_a_body_that_goes_is_kept(worker: WorkerProcess, ledger_path: Path) -> None:
    pid = pooling.ready_pid(worker)
    sent = pooled.four.apply_async(("goes", 30.0), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=10)
    eventually(lambda: pooling.wrote(ledger_path, "cancelled", "goes"))
    # Over the time that a body has to go.
    assert pooled.hold.delay("later", 1.5).get(timeout=10) == "later"
    assert pooling.ready_pids(worker) == [pid]


def test_a_late_answer_of_a_body_that_was_stopped_is_dropped(ledger_path: Path) -> None:
    sent = pooled.misbehave.apply_async(("swallow", "late", 1.2), time_limit=0.4)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=10)
    eventually(lambda: pooling.wrote(ledger_path, "ended", "late"))
    assert pooled.misbehave.delay("swallow", "next", 0.1).get(timeout=10) == "next"
    assert sent.state == "FAILURE"


@pytest.mark.parametrize("body", BODIES)
def test_revoke_with_terminate_stops_a_running_input(
    body: Any, neighbours: None, ledger_path: Path, worker: WorkerProcess, request: Any
) -> None:
    name = request.node.name
    with pooling.events("task-revoked") as revoked:
        sent = body.delay(name, 20.0)
        eventually(lambda: pooling.began(ledger_path, name))
        sent.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            sent.get(timeout=10)
        eventually(lambda: sent.id in revoked)
        eventually(lambda: sent.id not in _active(worker))
    assert revoked.count(sent.id) == 1
    # Its slot is free again, and nothing of it is stored later.
    assert pooled.plain.delay(1).get(timeout=10) == 2
    assert pooling.wrote(ledger_path, "ended", name) == 0
    assert sent.state == "REVOKED"


def _active(worker: WorkerProcess) -> list[str]:
    return [one["id"] for one in pooling.ask(worker, "active")]


@pytest.fixture
def blocker(ledger_path: Path) -> Iterator[None]:
    """Something that holds the one slot of ``single``, so that what follows waits in the pool."""
    name = f"blocker{len(ledger_path.read_text())}"
    sent = pooled.single.delay(name, 2.0)
    eventually(lambda: pooling.began(ledger_path, name))
    yield
    assert sent.get(timeout=20) == name


@pytest.mark.parametrize("terminate", [True, False])
def test_an_input_that_is_revoked_while_it_waits_never_starts(
    terminate: bool, blocker: None, ledger_path: Path, worker: WorkerProcess
) -> None:
    name = f"revoked{terminate}"
    sent = pooled.single.delay(name, 0.0)
    eventually(lambda: sent.id in _reserved(worker))
    sent.revoke(terminate=terminate)
    after = pooled.single.delay(f"after {name}")
    assert after.get(timeout=20) == f"after {name}"
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=10)
    assert pooling.began(ledger_path, name) == []


def _reserved(worker: WorkerProcess) -> list[str]:
    return [one["id"] for one in pooling.ask(worker, "reserved")]


def test_an_input_that_expires_while_it_waits_never_starts(
    blocker: None, ledger_path: Path, worker: WorkerProcess
) -> None:
    sent = pooled.single.apply_async(("expired",), expires=1.0)
    eventually(lambda: sent.id in _reserved(worker))
    assert pooled.single.delay("after expiry").get(timeout=20) == "after expiry"
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=10)
    assert pooling.began(ledger_path, "expired") == []


def test_a_caller_that_gives_up_revokes_its_input(blocker: None, ledger_path: Path) -> None:
    async def give_up() -> None:
        await pooled.single.options(timeout=0.3)("given up")

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert pooled.single.delay("after giving up").get(timeout=20) == "after giving up"
    assert pooling.began(ledger_path, "given up") == []


def test_inspect_shows_what_runs_and_in_which_child(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    sent = pooled.four.delay("shown", 2.0)
    (pid,) = eventually(lambda: pooling.began(ledger_path, "shown"))
    (shown,) = [one for one in pooling.ask(worker, "active") if one["id"] == sent.id]
    assert shown["worker_pid"] == pid
    assert shown["name"] == "pooled.four"
    eventually(lambda: pooling.replicas(worker)[0]["in_flight"] >= 1, 5)
    assert sent.get(timeout=10) == "shown"


def test_limits_of_many_inputs_hold_at_once(ledger_path: Path) -> None:
    sent = [pooled.hold.apply_async((f"m{n}", 20.0), soft_time_limit=0.5) for n in range(100)]
    assert [one.get(timeout=20) for one in sent] == ["soft"] * 100
