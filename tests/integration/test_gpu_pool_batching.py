"""Inputs share calls on the GPU pool, and each keeps its own state, limits, answer and retry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gathered
import ledger
import pytest
from celery import chord, group, states
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

import gw_celery as gw
from gw_celery import testing
from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("worker")]


@pytest.fixture(scope="module")
def worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    with pooling.module_worker(
        redis_server, tmp_path_factory, module="gathered", queues="cpu", extra_args=["-E"]
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def ledger_path(worker: WorkerProcess) -> Path:
    """The ledger of the worker, empty."""
    path = pooling.ledger_of(worker)
    path.write_text("")
    return path


def calls(path: Path, method: str) -> list[list[str]]:
    """The inputs of each call of a method, in order."""
    return [line[4:] for line in ledger.words(path, "called") if line[2] == method]


def sizes(path: Path, method: str) -> list[int]:
    return [len(one) for one in calls(path, method)]


def sent(method: Any, names: list[str], *args: Any, last: dict[str, Any] | None = None) -> Any:
    """Results of one call for each name, published together, the last one with options."""
    signatures = [method.s(name, *args) for name in names]
    signatures[-1].set(**(last or {}))
    return group(signatures).apply_async().results


NAMES = [f"n{number}" for number in range(64)]


@pytest.mark.parametrize("method", ["rest", "compute"])
def test_inputs_that_come_together_share_calls(method: str, ledger_path: Path) -> None:
    results = sent(getattr(gathered.Model(), method), NAMES)
    assert [one.get(timeout=30) for one in results] == NAMES
    assert sorted(name for one in calls(ledger_path, method) for name in one) == sorted(NAMES)
    assert max(sizes(ledger_path, method)) >= 8
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)


def test_while_the_model_is_busy_inputs_gather_for_one_call(ledger_path: Path) -> None:
    first = gathered.Busy().rest.delay("first", 3.0)
    eventually(lambda: pooling.began(ledger_path, "first"))
    late = sent(gathered.Busy().rest, NAMES[:20])
    assert first.get(timeout=30) == "first"
    assert [one.get(timeout=30) for one in late] == NAMES[:20]
    assert sizes(ledger_path, "rest") == [1, 20]


def test_a_lone_call_waits_no_longer_than_its_method_says() -> None:
    gathered.Busy().rest.remote("warm")
    begun = time.monotonic()
    for _ in range(5):
        gathered.Busy().rest.remote("alone")
    without = time.monotonic() - begun
    begun = time.monotonic()
    for _ in range(5):
        gathered.Model().rest.remote("alone")
    assert time.monotonic() - begun < 2 * without + 5 * 0.3 + 0.5


def test_parameter_sets_never_share_a_call(ledger_path: Path) -> None:
    results = group(
        gathered.Model(scale=scale).scaled.s(number) for number in range(8) for scale in (1, 2, 3)
    ).apply_async()
    assert results.get(timeout=30) == [n * scale for n in range(8) for scale in (1, 2, 3)]
    scales = [{entry.split(":")[0] for entry in one} for one in calls(ledger_path, "scaled")]
    assert {len(one) for one in scales} == {1}
    assert set.union(*scales) == {"1", "2", "3"}


def test_a_body_awaits_a_batched_method_of_its_own_service_without_a_slot(
    ledger_path: Path,
) -> None:
    assert gathered.Model().plain.remote("x") == "x-a x-b"
    assert sizes(ledger_path, "rest") == [2]


def test_a_batch_that_would_wait_for_another_of_its_service_is_told() -> None:
    with pytest.raises(gw.UsageError, match=r"call self\.rest"):
        gathered.Model().nested.delay("x").get(timeout=20)


def test_a_client_awaits_many_and_they_share_calls(ledger_path: Path) -> None:
    async def main() -> list[str]:
        return await asyncio.gather(*(gathered.Model().rest(name) for name in NAMES))

    assert asyncio.run(main()) == NAMES
    assert max(sizes(ledger_path, "rest")) > 1


# -- each input's own fate --


def test_one_bad_input_of_64_fails_with_its_own_error(ledger_path: Path) -> None:
    words = [f"w{number}" for number in range(63)]
    results = sent(gathered.Fragile().judge, [*words, "raise"])
    answers = [one.get(timeout=30, propagate=False) for one in results]
    assert answers[:-1] == words
    assert str(answers[-1]) == "one of them is bad"
    assert results[-1].state == states.FAILURE
    assert {one.state for one in results[:-1]} == {states.SUCCESS}


def test_exceptions_in_the_answer_are_each_inputs_own(worker: WorkerProcess) -> None:
    ignored, rejected, failed, fine = sent(
        gathered.Fragile().judge, ["ignore", "reject", "error", "fine"]
    )
    assert fine.get(timeout=30) == "fine"
    with pytest.raises(ValueError, match="the answer of one"):
        failed.get(timeout=30)
    eventually(lambda: pooling.ask(worker, "active", gathered.celery) == [])
    assert ignored.state == states.PENDING
    # Celery 5.6 leaves it pending, 5.7 stores why it was dropped.
    assert repr(rejected.result) in ("None", "reject requeue=False: not this one")
    ignored.forget()
    rejected.forget()


def test_inputs_are_retried_each_for_itself(ledger_path: Path) -> None:
    names = NAMES[:6]
    assert [one.get(timeout=30) for one in sent(gathered.Fragile().retry, names)] == names
    assert [len(pooling.began(ledger_path, name)) for name in names] == [2] * 6


def test_a_retry_in_the_answer_sends_that_input_again(ledger_path: Path) -> None:
    results = sent(gathered.Fragile().ask, ["again", "fine"])
    assert results[1].get(timeout=30) == "fine"
    with pytest.raises(OSError, match="again"):
        results[0].get(timeout=30)
    assert len(pooling.began(ledger_path, "again")) == 3
    assert len(pooling.began(ledger_path, "fine")) == 1


def test_a_chord_over_batched_inputs() -> None:
    header = [gathered.Model().rest.s(name) for name in NAMES[:32]]
    body = gathered.Model().rest.si("done")
    assert chord(header)(body).get(timeout=30) == "done"


def test_a_call_that_runs_out_of_memory_is_halved_until_it_fits(
    ledger_path: Path, worker: WorkerProcess
) -> None:
    names = NAMES[:16]
    assert [one.get(timeout=30) for one in sent(gathered.Small().fit, names)] == names
    assert pooling.counts(ledger_path, names)["finished once"] == 16
    before = len(calls(ledger_path, "fit"))
    assert [one.get(timeout=30) for one in sent(gathered.Small().fit, names)] == names
    assert max(sizes(ledger_path, "fit")[before:]) == 4
    assert "its batches have 4 inputs at most" in worker.log_text()


@pytest.mark.parametrize("method", ["rest", "compute"])
def test_a_hard_limit_answers_one_input_at_once_and_harms_no_other(
    method: str, ledger_path: Path, worker: WorkerProcess
) -> None:
    (pid,) = eventually(lambda: pooling.ready_pids(worker, gathered.celery))
    bound = getattr(gathered.Model(), method)
    *others, limited = sent(bound, [*NAMES[:4], "limited"], 4.0, last={"time_limit": 1.0})
    eventually(lambda: pooling.began(ledger_path, "limited"))
    begun = time.monotonic()
    with pytest.raises(TimeLimitExceeded):
        limited.get(timeout=30)
    assert time.monotonic() - begun < 3.0
    assert [one.get(timeout=30) for one in others] == NAMES[:4]
    assert limited.state == states.FAILURE
    assert len(calls(ledger_path, method)) == 1
    assert pooling.began(ledger_path, NAMES[0]) == [pid]
    eventually(lambda: pooling.ready_pids(worker, gathered.celery) == [pid])


def test_a_soft_limit_fails_one_input_of_a_call_and_harms_no_other(ledger_path: Path) -> None:
    *others, limited = sent(
        gathered.Model().rest, [*NAMES[:4], "limited"], 3.0, last={"soft_time_limit": 0.5}
    )
    with pytest.raises(SoftTimeLimitExceeded):
        limited.get(timeout=30)
    assert [one.get(timeout=30) for one in others] == NAMES[:4]
    assert sizes(ledger_path, "rest") == [5]


def test_a_revocation_during_a_call_harms_no_other(ledger_path: Path) -> None:
    *others, revoked = sent(gathered.Model().rest, [*NAMES[:4], "revoked"], 2.0)
    eventually(lambda: pooling.began(ledger_path, "revoked"))
    revoked.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=30)
    assert [one.get(timeout=30) for one in others] == NAMES[:4]
    eventually(lambda: revoked.state == states.REVOKED)
    assert sizes(ledger_path, "rest") == [5]


@pytest.mark.parametrize("terminate", [False, True])
def test_an_input_that_is_revoked_while_it_gathers_never_joins(
    terminate: bool, ledger_path: Path
) -> None:
    first = gathered.Busy().rest.delay("first", 5.0)
    eventually(lambda: pooling.began(ledger_path, "first"))
    revoked, staying = sent(gathered.Busy().rest, ["revoked", "staying"])
    revoked.revoke(terminate=terminate)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=4.5)
    assert first.get(timeout=30) == "first"
    assert staying.get(timeout=30) == "staying"
    assert calls(ledger_path, "rest") == [["first"], ["staying"]]


def test_an_input_that_expires_while_it_gathers_never_joins(ledger_path: Path) -> None:
    first = gathered.Busy().rest.delay("first", 1.5)
    eventually(lambda: pooling.began(ledger_path, "first"))
    soon = datetime.now(UTC) + timedelta(seconds=0.7)
    late = gathered.Busy().rest.apply_async(("late",), expires=soon)
    with pytest.raises(TaskRevokedError, match="expired"):
        late.get(timeout=30)
    assert first.get(timeout=30) == "first"
    assert calls(ledger_path, "rest") == [["first"]]


def test_an_input_starts_for_celery_when_its_batch_does(
    ledger_path: Path, worker: WorkerProcess
) -> None:
    with pooling.events("task-started", gathered.celery) as started:
        first = gathered.Busy().rest.delay("first", 1.0)
        eventually(lambda: first.id in started)
        second = gathered.Busy().rest.delay("second")
        reserved = eventually(lambda: pooling.ask(worker, "reserved", gathered.celery))
        assert [one["id"] for one in reserved] == [second.id]
        assert second.id not in started
        assert second.get(timeout=30) == "second"
        eventually(lambda: second.id in started)
    assert pooling.began(ledger_path, "second")
