"""Children and workers of the GPU pool die, and every input is accounted for."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import ledger
import pooled
import pytest
from celery.exceptions import WorkerLostError

from gw_celery import errors
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import StartWorker, WorkerProcess, eventually, is_alive

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(8)]


def in_two_children(worker: WorkerProcess, body: Any, ledger_path: Path) -> tuple[int, list[Any]]:
    """Four inputs in flight in each of two children; the pid of one of them, and the results."""
    sent = [body.delay(name, 2.0) for name in NAMES]
    eventually(lambda: len(pooling.ask(worker, "active")) == 8, 20)
    pids = [pooling.began(ledger_path, name)[0] for name in NAMES]
    assert {pids.count(pid) for pid in pids} == {4}
    return pids[0], sent


@pytest.mark.parametrize("body", [pooled.early, pooled.unforgiven])
def test_a_killed_child_fails_what_it_ran_unless_told_otherwise(
    body: Any, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2)
    victim, sent = in_two_children(worker, body, ledger_path)
    os.kill(victim, signal.SIGKILL)
    answers = [one.get(timeout=20, propagate=False) for one in sent]
    lost = [one for one in answers if isinstance(one, WorkerLostError)]
    assert len(lost) == 4
    assert "signal 9 (SIGKILL)" in str(lost[0])
    assert pooling.counts(ledger_path, NAMES) == {
        "sent": 8, "finished once": 4, "finished twice": 0, "started twice": 0, "lost": 4
    }  # fmt: skip
    eventually(lambda: len(pooling.ready_pids(worker)) == 2, 20)


def test_inputs_of_a_killed_child_run_again_in_another(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2)
    victim, sent = in_two_children(worker, pooled.four, ledger_path)
    os.kill(victim, signal.SIGKILL)
    assert [one.get(timeout=40) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES, started_twice=4)
    assert len(ledger.words(ledger_path, "began")) == 12
    # One line for the child, not one for each input.
    assert worker.log_text().count("with 4 inputs in flight") == 1


KILLERS = [
    pytest.param(pooled.misbehave, "kill", id="async-kill"),
    pytest.param(pooled.misbehave, "abort", id="async-abort"),
    pytest.param(pooled.Desk().misbehave, "leave", id="sync-exit"),
]


@pytest.mark.parametrize(("body", "how"), KILLERS)
def test_an_input_that_kills_its_child_is_given_up_and_the_others_are_served(
    body: Any, how: str, start_pooled: StartPooled, ledger_path: Path
) -> None:
    start_pooled(settings={"gw_max_deaths": 2})
    good = [pooled.four.delay(name, 0.5) for name in NAMES[:4]]
    bad = body.delay(how, "poison")
    good += [pooled.four.delay(name, 0.5) for name in NAMES[4:]]
    with pytest.raises(errors.PoisonedInput):
        bad.get(timeout=40)
    assert [one.get(timeout=40) for one in good] == NAMES
    # In company once, and alone twice.
    assert 2 <= len(pooling.began(ledger_path, "poison")) <= 3
    counts = pooling.counts(ledger_path, NAMES)
    assert (counts["finished once"], counts["lost"]) == (8, 0)


def test_an_early_input_that_kills_its_child_fails_at_once(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    start_pooled()
    with pytest.raises(WorkerLostError):
        pooled.plain_misbehave.delay("kill", "poison").get(timeout=20)
    assert len(pooling.began(ledger_path, "poison")) == 1
    assert pooled.plain.delay(1).get(timeout=20) == 2


@pytest.mark.skipif(
    not hasattr(pooled.celery.Task, "retry_on_worker_lost"), reason="new in Celery 5.7"
)
def test_a_task_that_retries_its_death_does_so_as_often_as_it_may(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    start_pooled()
    sent = pooled.plain_retries_its_death.delay("retries")
    assert isinstance(sent.get(timeout=60, propagate=False), Exception)
    assert len(pooling.began(ledger_path, "retries")) == 3


def test_a_killed_worker_takes_its_children_along_and_loses_nothing(
    start_worker: StartWorker, ledger_path: Path, rabbitmq_url: str, result_url: str
) -> None:
    worker = pooling.start(start_worker, ledger_path, broker=rabbitmq_url, replicas=2)
    with pooling.client(rabbitmq_url, result_url) as app:
        sent = [app.send_task("pooled.four", (name, 1.5), queue="cpu.four") for name in NAMES]
        eventually(lambda: len(pooling.ask(worker, "active", app)) == 8, 20)
        children = worker.children()
        worker.kill()
        eventually(lambda: not any(map(is_alive, children)))
        pooling.start(start_worker, ledger_path, broker=rabbitmq_url, replicas=2)
        assert [one.get(timeout=40) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES, started_twice=8)


def test_a_frozen_child_is_replaced_and_its_inputs_run_elsewhere(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2, settings={"gw_heartbeat_timeout": 3.0})
    victim, sent = in_two_children(worker, pooled.four, ledger_path)
    os.kill(victim, signal.SIGSTOP)
    assert [one.get(timeout=40) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES, started_twice=4)
    assert not is_alive(victim)
    assert "sent no heartbeat for" in worker.log_text()


def test_a_frozen_child_does_not_keep_a_worker_from_stopping(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"gw_heartbeat_timeout": 3.0})
    sent = pooled.four.delay("frozen", 0.5)
    (pid,) = eventually(lambda: pooling.began(ledger_path, "frozen"))
    os.kill(pid, signal.SIGSTOP)
    worker.stop()
    assert not is_alive(pid)
    start_pooled()
    assert sent.get(timeout=20) == "frozen"


@pytest.mark.parametrize(
    "bound", [{"worker_max_tasks_per_child": 5}, {"worker_max_memory_per_child": 1}]
)
def test_a_worn_child_is_replaced_by_one_that_is_ready_before_it_leaves(
    bound: dict[str, int], start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(settings=bound)
    names = [f"n{number}" for number in range(30)]
    sent = [pooled.four.delay(name, 0.4) for name in names]
    assert [one.get(timeout=40) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    eventually(lambda: pooling.wrote(ledger_path, "left", "Model"))
    words = [line[1:] for line in ledger.read(ledger_path) if line[2:] == ["Model"]]
    assert words.index(["left", "Model"]) > words.index(["entered", "Model"], 2)
    # A queue without a backlog was consumed all the time.
    assert "the queue cpu.add is not consumed" not in worker.log_text()
