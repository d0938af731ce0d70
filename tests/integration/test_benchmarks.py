"""Benchmarks in real workers: nothing is READY without a score, and its making is not seen."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import ledger
import measured
import pytest
import redis

from gw_celery import testing
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def start(start_pooled: StartPooled) -> Any:
    """Start a worker of ``measured`` for some of its services."""

    def start(*names: str, **given: Any) -> WorkerProcess:
        given = {"module": "measured", **given}
        return start_pooled(queues=",".join(f"cpu.{name}" for name in names), **given)

    return start


def scores(worker: WorkerProcess) -> dict[str, Any]:
    """What ``inspect stats`` says of each service."""
    stats = eventually(lambda: pooling.ask(worker, "stats", measured.celery), 20)
    found: dict[str, Any] = stats["pool"]["gw_scores"]
    return found


def score_of(worker: WorkerProcess, service: str) -> dict[str, Any]:
    """The score of a service that has been measured; what stats shows is a second old."""

    def look() -> dict[str, Any]:
        found: dict[str, Any] = scores(worker)[service]
        return found if found["measured"] else {}

    return eventually(look, 20)


def test_the_score_of_20_ms_for_ten_at_a_time_is_500_calls_a_second(start: Any) -> None:
    # What disturbs a machine lowers a score and never raises it: the best of a few measurements.
    ideal, best = 10 / 0.02 * 2.0, 0.0
    for _ in range(3):
        worker = start("rest")
        service = score_of(worker, "measured.rest")
        worker.stop()
        (found,) = service["benchmarks"]
        assert service["value"] == found["value"] <= 1.02 * ideal
        assert found["least"] <= found["value"] <= found["most"]
        assert len(found["rounds"]) == 10
        assert 0.02 <= found["p50"] <= found["p95"]
        assert found["success_rate"] == 1.0
        best = max(best, found["value"])
        if best >= 0.9 * ideal:
            break
    assert best >= 0.9 * ideal


def test_a_benchmark_that_always_raises_never_becomes_ready(start: Any, ledger_path: Path) -> None:
    worker = start("broken", is_loaded=False)
    eventually(lambda: worker.log_text().count("the next child starts in") == 3, 40)
    # Three starts, each at its own backoff: 1 s, then 2 s.
    (replica,) = pooling.replicas(worker, measured.celery)
    assert replica["state"] in ("failed", "starting", "entering", "benchmarking")
    assert "measured.broken gave no score: all of its 12 inputs failed" in replica["last_error"]
    assert "ValueError: no weights" in replica["last_error"]
    text = worker.log_text()
    assert "is ready\n" not in text.replace(f"{worker.node} ready", "")
    assert [f"starts in {wait} s" in text for wait in (1, 2, 4)] == [True] * 3
    assert len({line[0] for line in ledger.read(ledger_path)}) == 3, "one process after the other"
    assert measured.celery.control.inspect([worker.node]).active_queues() == {worker.node: []}
    assert scores(worker)["measured.broken"]["value"] is None


def test_a_benchmark_that_hangs_is_ended_at_its_time(start: Any, ledger_path: Path) -> None:
    began = time.monotonic()
    worker = start("hanging", is_loaded=False, settings={"gw_benchmark_timeout": 2.0})
    eventually(lambda: "the next child starts in" in worker.log_text(), 30)
    assert time.monotonic() - began < 25
    assert (
        "measured.hanging gave no score: it was not over after 2 s (setting gw_benchmark_timeout)"
        in worker.log_text()
    )
    assert len(ledger.words(ledger_path, "hangs")) == 1


def test_batches_are_measured_full(start: Any, ledger_path: Path) -> None:
    worker = start("shared")
    calls = [line[2:] for line in ledger.words(ledger_path, "batch")]
    assert calls == [["8", "full"]] * 2 * 4  # three rounds after one that does not count
    assert score_of(worker, "measured.shared")["value"] > 0


def test_methods_are_measured_where_they_run_and_then_left(start: Any, ledger_path: Path) -> None:
    worker = start("Desk")
    service = score_of(worker, "measured.Desk")
    assert [one["task"] for one in service["benchmarks"]] == [
        "measured.Desk.sit",
        "measured.Desk.stand",
    ]
    values = [one["value"] for one in service["benchmarks"]]
    assert min(values) <= service["value"] <= max(values)
    sat = [line[2:] for line in ledger.words(ledger_path, "sat")]
    assert sat == [["plain", "False"]] * 4 * 3, "in threads, with the default parameters"
    assert ledger.words(ledger_path, "left") == []
    assert measured.Desk(label="other").sit.remote(0.0) == "other"


def test_nothing_outside_a_replica_learns_of_its_benchmark(
    start: Any, redis_server: testing.Server, ledger_path: Path
) -> None:
    with (
        pooling.events("task-received", measured.celery) as received,
        pooling.events("task-started", measured.celery) as began,
        pooling.events("task-succeeded", measured.celery) as succeeded,
        redis.Redis.from_url(
            redis_server.result_url.replace("redis+socket", "unix").replace("virtual_host", "db")
        ) as results,
    ):
        worker = start("curious", extra_args=["-E"])
        assert len(ledger.words(ledger_path, "curious")) == 11 * 4
        assert results.keys("celery-task-meta-*") == []
        stats = pooling.ask(worker, "stats", measured.celery)
        assert stats["total"] == {}
        # What comes after it is seen: had the rest been sent, it would have been seen before.
        sent = measured.curious.delay(5)
        assert sent.get(timeout=20) == 5
        eventually(lambda: sent.id in succeeded)
        assert (set(received), set(began), set(succeeded)) == ({sent.id},) * 3


SOURCE = """
import asyncio, ledger
from measured import *

@app.remote(gpu=CPU, benchmark_dataset=[{{"x": 1}}], benchmark_runs=1)
async def changing(x: int) -> int:
    ledger.write("ran", {answer})
    return {answer}
"""


def test_a_child_after_a_crash_is_not_measured_and_one_after_a_restart_is(
    start: Any, tmp_path: Path, ledger_path: Path
) -> None:
    def ran() -> list[str]:
        return [line[2] for line in ledger.words(ledger_path, "ran")]

    def other_than(pid: int) -> int:
        pids = eventually(lambda: [*{*pooling.ready_pids(worker, measured.celery)} - {pid}], 30)
        return int(pids[0])

    (tmp_path / "changing.py").write_text(SOURCE.format(answer="1"))
    worker = start("changing", module="changing")
    first = score_of(worker, "changing.changing")
    (pid,) = eventually(lambda: pooling.ready_pids(worker, measured.celery), 20)
    assert ran() == ["1", "1"]  # a round after one that does not count
    os.kill(pid, signal.SIGKILL)
    pid = other_than(pid)
    assert ran() == ["1", "1"]
    second = score_of(worker, "changing.changing")
    assert second["value"] == first["value"]
    assert second["benchmarks"][0]["age"] > first["benchmarks"][0]["age"]
    (tmp_path / "changing.py").write_text(SOURCE.format(answer="2 + 0"))
    measured.celery.control.broadcast("gw_restart", destination=[worker.node])
    other_than(pid)
    assert ran() == ["1", "1", "2", "2"]


def test_full_replicas_correct_a_score_that_no_traffic_confirms(start: Any) -> None:
    # The benchmark rests for 20 ms and the traffic for a second: ten at a time, of workload 2.
    for body, count in ((measured.rest, 300), (measured.unmeasured, 120)):
        for _ in range(count):
            body.apply_async(kwargs={"seconds": 1.0}, ignore_result=True)
    worker = start("rest", "unmeasured")
    measure = score_of(worker, "measured.rest")["measured"]
    eventually(lambda: "service measured.rest: by the traffic of full" in worker.log_text(), 40)
    eventually(lambda: scores(worker)["measured.unmeasured"]["value"], 40)
    found = scores(worker)
    assert found["measured.rest"]["measured"] == measure
    assert found["measured.rest"]["value"] == found["measured.rest"]["served"] < 0.7 * measure
    assert 0.5 * 4 < found["measured.unmeasured"]["value"] < 1.2 * 4
    assert worker.log_text().count("and the worker uses it") == 1


def test_an_idle_replica_is_measured_again_and_serves_again(start: Any, ledger_path: Path) -> None:
    worker = start("rest", "shared", settings={"gw_benchmark_period": 3.0})
    (pid,) = eventually(lambda: pooling.ready_pids(worker, measured.celery), 20)
    # It is busy for longer than the score may be old.
    assert measured.rest.remote(5.0) == 5.0

    def order() -> list[str]:
        return [line[1] for line in ledger.read(ledger_path)]

    began, ended = order().index("busy"), order().index("idle")
    assert order()[began + 1 : ended] == []
    eventually(lambda: "batch" in order()[ended:], 20)
    assert measured.rest.remote(0.01) == 0.01
    assert pooling.ready_pids(worker, measured.celery) in ([], [pid])
    eventually(lambda: score_of(worker, "measured.rest")["benchmarks"][0]["age"] < 5.0)


def both(pids: list[int]) -> list[int]:
    """The children of two replicas, once there are two."""
    return pids if len(pids) == 2 else []


def test_a_tick_has_idle_replicas_measured_again_one_at_a_time(
    start: Any, ledger_path: Path
) -> None:
    worker = start("shared", replicas=2, settings={"gw_benchmark_period": None})
    pids = set(eventually(lambda: both(pooling.ready_pids(worker, measured.celery)), 20))
    before = len(ledger.words(ledger_path, "batch"))
    measured.celery.control.broadcast("gw_benchmark_tick", destination=[worker.node])

    def again() -> list[int]:
        return [int(line[0]) for line in ledger.words(ledger_path, "batch")[before:]]

    eventually(lambda: len(again()) == 16, 20)
    first = again()[0]
    assert again() == [first] * 8 + [*(pids - {first})] * 8


def test_a_worker_that_stops_does_not_wait_for_a_benchmark(start: Any, ledger_path: Path) -> None:
    worker = start("hanging", is_loaded=False)
    eventually(lambda: ledger.words(ledger_path, "hangs"), 30)
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 20
