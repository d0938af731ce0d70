from __future__ import annotations

import os
import threading

from gw_celery.worker import pipes


def test_a_worker_hears_why_its_children_cannot_load() -> None:
    made = pipes.Pipes()
    made.report("Model: no such file")
    made.report("Model: é\nand a second line")
    assert made.failures() == [
        pipes.Failure(pid=os.getpid(), reason="Model: no such file"),
        pipes.Failure(pid=os.getpid(), reason="Model: é\nand a second line"),
    ]


def test_a_reason_without_end_does_not_block_the_child_that_gives_it() -> None:
    made = pipes.Pipes()
    for _ in range(4):
        made.report("é" * 1_000_000)
    assert [len(one.reason) for one in made.failures()] == [2000] * 4


def test_a_worker_that_stops_does_not_wait_for_failures() -> None:
    made = pipes.Pipes()
    made.never_wait()
    assert made.failures() == []


def test_a_worker_without_an_event_loop_waits_for_them() -> None:
    made = pipes.Pipes()
    heard: list[pipes.Failure] = []
    thread = threading.Thread(target=lambda: heard.extend(made.failures()))
    thread.start()
    made.report("late")
    thread.join(30)
    assert [one.reason for one in heard] == ["late"]
