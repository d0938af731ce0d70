"""Children of a prefork worker are killed while it works: every input is answered."""

from __future__ import annotations

import collections
import itertools
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ledger
import pytest
import served

from tests.processes import StartWorker, WorkerProcess

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

TASKS = int(os.environ.get("GW_CHAOS_TASKS", "1500"))
#: Seconds between two kills.
PERIOD = 2.0


@contextmanager
def killing(worker: WorkerProcess, kills: list[int]) -> Iterator[None]:
    """Kill one child of ``worker`` every ``PERIOD`` seconds until the block ends."""
    over = threading.Event()
    chosen = random.Random(0)

    def kill() -> None:
        while not over.wait(PERIOD):
            if children := worker.children():
                victim = chosen.choice(children)
                os.kill(victim, signal.SIGKILL)
                kills.append(victim)

    killer = threading.Thread(target=kill, name="killer")
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()


@pytest.mark.timeout(900)
def test_no_input_is_lost_when_a_child_is_killed_every_2_seconds(
    start_worker: StartWorker, ledger_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"LEDGER": str(ledger_path)}
    # Its log has no ready line.
    quiet = {"extra_args": ["-l", "WARNING"], "wait_ready": False}
    worker = start_worker("served:celery", concurrency=2, env=env, **quiet)
    worker.wait_answer()
    kills: list[int] = []
    with killing(worker, kills):
        sent = [served.record.delay(f"n{number}") for number in range(TASKS)]
        answers = [one.get(timeout=600) for one in sent]
        # Kills while nothing runs prove little: go on until there were some under load.
        more = itertools.takewhile(lambda _: len(kills) < 3, itertools.count(TASKS))
        answers += [served.record.delay(f"n{number}").get(timeout=60) for number in more]
    ended = collections.Counter(line[2] for line in ledger.words(ledger_path, "ended"))
    began = collections.Counter(line[2] for line in ledger.words(ledger_path, "began"))
    counts = {
        "sent": len(answers),
        "kills": len(kills),
        "finished once": sum(count == 1 for count in ended.values()),
        "finished twice": sum(count > 1 for count in ended.values()),
        "started twice": sum(count > 1 for count in began.values()),
        "lost": len(answers) - len(ended),
    }
    with capsys.disabled():
        print(f"\n{counts}")
    assert answers == [f"n{number}" for number in range(len(answers))]
    assert counts["lost"] == 0
    # At-least-once: only what ran in a killed child may have started again.
    assert counts["started twice"] <= len(kills)
    assert counts["kills"] >= 3
