"""Bodies that fork on the GPU pool, or use up the file descriptors of their child."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import forking
import ledger
import pytest

from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually, is_alive

pytestmark = pytest.mark.integration

#: Turns of the loop of each input beside.
STEPS = 500
FORKING = {
    "async": forking.forks,
    "task": forking.forks_in_task,
    "batch": forking.forks_in_batch,
    "sync batch": forking.Desk().forks_in_batch,
    "sync": forking.Desk().forks,
    "thread": forking.Desk().forks_in_thread,
    "plain": forking.plain_forks,
}


@pytest.fixture
def worker(start_pooled: StartPooled) -> WorkerProcess:
    return start_pooled(module="forking")


def pid_of_fork(path: Path) -> int:
    """The fork that a body has made; what the ledger notes first is who wrote."""
    lines = eventually(lambda: ledger.words(path, "fork"), 20)
    return int(lines[-1][0])


@pytest.mark.parametrize("way", FORKING)
@pytest.mark.parametrize("how", ["return", "raise", "exit", "write"])
def test_a_fork_that_leaves_its_body_ends_and_stores_nothing(
    way: str, how: str, worker: WorkerProcess, ledger_path: Path
) -> None:
    child = pooling.ready_pid(worker)
    near = [forking.beside.delay(f"n{number}", STEPS) for number in range(5)]
    sent = FORKING[way].delay(how)
    assert sent.get(timeout=20) == "parent"
    fork = pid_of_fork(ledger_path)
    eventually(lambda: not is_alive(fork), 10)
    assert [one.get(timeout=20) for one in near] == [f"n{number}" for number in range(5)]
    steps = [line[2] for line in ledger.words(ledger_path, "step")]
    assert len(steps) == len(set(steps)) == 5 * STEPS, "each step ran once"
    assert sent.result == "parent"
    # The child goes on, with its channel.
    assert forking.Desk().opens.delay().get(timeout=20) == child


def test_a_fork_that_awaits_ends_and_runs_nothing(worker: WorkerProcess, ledger_path: Path) -> None:
    near = [forking.beside.delay(f"n{number}", STEPS) for number in range(5)]
    eventually(lambda: ledger.words(ledger_path, "step"), 20)
    assert forking.forks.delay("await").get(timeout=20) == "parent"
    fork = pid_of_fork(ledger_path)
    eventually(lambda: not is_alive(fork), 10)
    assert [one.get(timeout=20) for one in near] == [f"n{number}" for number in range(5)]
    assert not ledger.words(ledger_path, "awaited")
    assert str(fork) not in {line[0] for line in ledger.words(ledger_path, "step")}


@pytest.mark.parametrize("way", FORKING)
@pytest.mark.parametrize("end", ["stop", "kill child", "kill worker"])
def test_a_fork_ends_with_its_child(
    way: str, end: str, worker: WorkerProcess, ledger_path: Path
) -> None:
    child = pooling.ready_pid(worker)
    assert FORKING[way].delay("stay").get(timeout=20) == "parent"
    fork = pid_of_fork(ledger_path)
    assert is_alive(fork)
    if end == "kill child":
        os.kill(child, signal.SIGKILL)
    elif end == "kill worker":
        os.kill(worker.pid, signal.SIGKILL)
    else:
        worker.stop()
    eventually(lambda: not is_alive(fork), 10)


def test_a_process_of_a_synchronous_hook_outlives_its_thread_and_not_the_child(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(module="forking", env={"FORKS_AT_LOAD": "sync"})
    helper = forking.helper.delay().get(timeout=20)
    assert is_alive(helper)
    worker.stop()
    eventually(lambda: not is_alive(helper), 10)


def test_a_fork_of_an_asynchronous_hook_ends_and_reports_nothing(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(module="forking", env={"FORKS_AT_LOAD": "async"})
    fork = pid_of_fork(ledger_path)
    eventually(lambda: not is_alive(fork), 10)
    assert worker.log_text().count(" services\n") == 1
    assert forking.Desk().opens.delay().get(timeout=20) == pooling.ready_pid(worker)


@pytest.mark.parametrize("what", forking.EATERS)
@pytest.mark.parametrize("body", [forking.eats, forking.Desk().eats])
def test_a_child_without_file_descriptors_is_replaced(
    body: Any, what: str, worker: WorkerProcess
) -> None:
    # The connection for results is open before.
    child = forking.Desk().opens.delay().get(timeout=20)
    assert body.delay(what).get(timeout=20) == what
    eventually(lambda: "is ready" in worker.log_text().partition("file descriptors")[2], 30)
    assert f"pid {child}) ended while ready" in worker.log_text()
    assert "its inputs have used up its " in worker.log_text()
    assert forking.Desk().opens.delay().get(timeout=20) != child


def test_a_child_that_lacks_file_descriptors_for_a_moment_stays(worker: WorkerProcess) -> None:
    child = pooling.ready_pid(worker)
    assert forking.eats_for_a_moment.delay().get(timeout=20) > 10
    assert forking.Desk().opens.delay().get(timeout=20) == child


def test_a_child_and_what_it_starts_write_no_core_file(worker: WorkerProcess) -> None:
    assert forking.core_limits.delay().get(timeout=20) == ["0 0", "0 0"]
    assert forking.plain_core_limit.delay().get(timeout=20) == [0, 0]
