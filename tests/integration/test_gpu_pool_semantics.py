"""What a body may do on the GPU pool is what Celery lets it do elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ledger
import pooled
import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, MaxRetriesExceededError

from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("pooled_worker")]


@pytest.fixture
def ledger_path(pooled_worker: WorkerProcess) -> Path:
    return pooling.ledger_of(pooled_worker)


def test_retry_runs_the_body_again_with_its_count() -> None:
    sent = [pooled.retried.delay(until) for until in (0, 1, 2, 3)]
    assert [one.get(timeout=20) for one in sent] == [(until, True) for until in (0, 1, 2, 3)]


def test_autoretry_retries_and_gives_up_with_the_last_error() -> None:
    assert pooled.autoretried.delay(2).get(timeout=20) == 2.0
    with pytest.raises(ZeroDivisionError):
        pooled.autoretried.delay(9).get(timeout=20)


def test_a_retry_of_one_input_leaves_the_others_alone() -> None:
    sent = [pooled.retried.delay(number % 3) for number in range(30)]
    assert [one.get(timeout=30) for one in sent] == [(number % 3, True) for number in range(30)]


def test_more_retries_than_allowed_fail_the_input() -> None:
    with pytest.raises(MaxRetriesExceededError):
        pooled.retried.delay(99).get(timeout=20)


def test_ignore_leaves_the_state_that_the_body_set() -> None:
    sent = pooled.ignored.delay()
    eventually(lambda: sent.state == "CUSTOM")
    # One input at a time: the second ends after the first.
    second = pooled.ignored.delay()
    eventually(lambda: second.state == "CUSTOM")
    assert sent.state == "CUSTOM"


def test_reject_drops_the_input_or_gives_it_back(ledger_path: Path) -> None:
    dropped = pooled.rejected.delay("dropped")
    assert pooled.rejected.delay("back", requeue=True).get(timeout=20) == "back"
    assert pooling.wrote(ledger_path, "rejected", "back") == 2
    assert pooling.wrote(ledger_path, "rejected", "dropped") == 1
    # Celery 5.6 leaves it pending, 5.7 stores why it was dropped.
    assert repr(dropped.result) in ("None", "reject requeue=False: not for me")
    dropped.forget()


def test_the_request_and_the_current_task_are_right_in_64_interleaved_coroutines() -> None:
    async def all_seen() -> list[tuple[str, list[tuple[str, str]]]]:
        sent = [pooled.whoami.spawn(number) for number in range(64)]
        return [(one.id, await one) for one in sent]

    for task_id, seen in asyncio.run(all_seen()):
        assert seen == [(task_id, task_id)] * 7


def test_the_current_task_is_right_in_synchronous_bodies_in_threads() -> None:
    sent = [pooled.Desk().who.delay() for _ in range(16)]
    assert [one.get(timeout=20)[1] for one in sent] == [one.id for one in sent]


def test_chains_and_groups_run_across_the_tasks_of_one_worker() -> None:
    line = chain(pooled.add.s(1), pooled.plain.s(), pooled.add.s(10))
    assert line().get(timeout=20) == 13
    assert group(pooled.add.s(x) for x in range(50))().get(timeout=30) == list(range(1, 51))


def test_a_chord_of_500_asynchronous_tasks_calls_its_body_once(ledger_path: Path) -> None:
    sent = chord((pooled.add.s(x) for x in range(500)), pooled.total.s())()
    assert sent.get(timeout=60) == sum(range(1, 501))
    assert pooling.wrote(ledger_path, "totalled", "500") == 1


def test_a_failed_part_fails_its_chord(ledger_path: Path) -> None:
    parts = [pooled.add.s(1), pooled.autoretried.s(9), pooled.add.s(2)]
    body = pooled.total.s().on_error(pooled.note.s(name="chord"))
    failure = chord(parts, body)().get(timeout=20, propagate=False)
    assert isinstance(failure, ChordError)
    assert "ZeroDivisionError" in str(failure)
    eventually(lambda: pooling.wrote(ledger_path, "errback", "chord") == 1)


def test_callbacks_and_errbacks_run_once(ledger_path: Path) -> None:
    linked = pooled.four.si("linked")
    assert pooled.add.apply_async((1,), link=linked).get(timeout=20) == 2
    eventually(lambda: pooling.wrote(ledger_path, "ended", "linked"))
    sent = pooled.misbehave.apply_async(("memory", "m"), link_error=pooled.note.s(name="failed"))
    with pytest.raises(MemoryError):
        sent.get(timeout=20)
    # The errback is a plain task: a later one of the same queue ends after it.
    assert pooled.plain.delay(1).get(timeout=20) == 2
    eventually(lambda: pooling.wrote(ledger_path, "errback", "failed"))
    assert pooling.wrote(ledger_path, "errback", "failed") == 1
    assert len(ledger.words(ledger_path, "ended")) == len(
        {line[2] for line in ledger.words(ledger_path, "ended")}
    )


def test_an_eta_and_a_countdown_are_kept_by_the_worker() -> None:
    sent = [pooled.add.apply_async((x,), countdown=0.5) for x in range(20)]
    assert [one.get(timeout=20) for one in sent] == list(range(1, 21))


def test_an_unserialisable_answer_fails_its_input_only() -> None:
    sent = pooled.misbehave.delay("unserialisable", "u")
    with pytest.raises(Exception, match="lock"):
        sent.get(timeout=20)
    assert pooled.add.delay(1).get(timeout=20) == 2


def test_10_mb_arguments_reach_their_bodies() -> None:
    sent = [pooled.four.delay("x" * 10_000_000) for _ in range(2)]
    assert [len(one.get(timeout=40)) for one in sent] == [10_000_000] * 2
