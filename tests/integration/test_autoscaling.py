"""A worker that sizes itself: under a burst, to zero and back, beside others, steered by hand."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ledger
import pytest
import scaled

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually, logged_at

pytestmark = pytest.mark.integration

#: Slots of a replica: four inputs, and a plain task.
UNIT = 5
Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(start_worker: StartWorker, ledger_path: Path) -> Start:
    """Start ``gw worker`` for ``scaled``; its settings are keywords."""

    def started(
        *arguments: str,
        load: float = 0.0,
        is_loaded: bool = True,
        env: Any = None,
        options: Any = None,
        **settings: Any,
    ) -> WorkerProcess:
        given = {"LEDGER": str(ledger_path), "START": str(load), "SETTINGS": json.dumps(settings)}
        worker = start_worker(
            "scaled:celery",
            verb=["gw", "worker"],
            queues=None,
            extra_args=["--gpu", "CPU", *arguments],
            env={**given, **(env or {})},
            **(options or {}),
        )
        if is_loaded:
            pooling.wait_loaded(worker)
        return worker

    return started


def status(worker: WorkerProcess, app: Any = scaled.celery) -> dict[str, Any]:
    inspect = app.control.inspect([worker.node], timeout=15, limit=1)
    answer = eventually(lambda: inspect._request("gw_status"), 20)[worker.node]
    assert isinstance(answer, dict)
    return answer


def size(worker: WorkerProcess, app: Any = scaled.celery) -> int:
    return len(status(worker, app)["replicas"])


def states(worker: WorkerProcess) -> list[str]:
    return [one["state"] for one in status(worker)["replicas"]]


def test_a_train_of_bursts_starts_no_more_replicas_than_the_maximum(
    start: Start, ledger_path: Path
) -> None:
    worker = start(load=1.0)
    names = [f"n{number}" for number in range(240)]
    most = 0
    for burst in range(4):
        sent = [scaled.infer.delay(name, 0.2) for name in names[60 * burst : 60 * burst + 60]]
        most = max(most, size(worker))
        for one in sent:
            one.get(timeout=40)
    most = max(most, size(worker))
    assert 1 < most <= 4
    assert pooling.wrote(ledger_path, "entering", "Model") <= 4
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    assert worker.log_text().count(" replicas: ") <= 3


def test_what_a_burst_started_goes_by_itself_after_the_window(
    start: Start, ledger_path: Path
) -> None:
    window = 10.0
    # What was needed goes after 4 x (start-up + this): by then, unless the machine is very busy.
    patience = {"gw_target_queue_time": 0.2}
    worker = start("--autoscale", "3,1", load=0.5, gw_scale_window=window, **patience)
    names = [f"n{number}" for number in range(120)]
    sent = [scaled.infer.delay(name, 0.5) for name in names]
    eventually(lambda: states(worker) == ["ready"] * 3, 30)
    for one in sent:
        one.get(timeout=40)
    ended = time.time()

    def has_shrunk() -> bool:
        """Look, and send what one replica is enough for: it runs in whichever has a slot."""
        names.append(f"n{len(names)}")
        sent.append(scaled.infer.delay(names[-1], 0.5))
        return "to 1 replicas" in worker.log_text()

    eventually(has_shrunk, 60, interval=0.3)
    eventually(lambda: states(worker) == ["ready"], 20)
    # It looks once a second, and the last inputs of the burst no longer fill three replicas.
    assert logged_at(worker, "from 3 to ") - ended > window - 2.0
    for one in sent:
        one.get(timeout=40)
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    assert pooling.wrote(ledger_path, "entering", "Model") == 3


def test_to_zero_and_back(start: Start, ledger_path: Path) -> None:
    worker = start("--autoscale", "4,0", load=1.0, gw_inactivity_timeout=2.0)
    eventually(lambda: status(worker)["replicas"] == [], 30)
    assert status(worker)["open_queues"] == []
    assert pooling.wrote(ledger_path, "left", "Model") == 1
    began = time.time()
    assert scaled.infer.delay("first").get(timeout=40) == "first"
    answered = time.time() - began
    assert pooling.wrote(ledger_path, "entering", "Model") == 2
    asked = logged_at(worker, "from 0 to 1 replicas: scaled.infer needs")
    start_up = logged_at(worker, "is ready\n") - asked
    # Seen within half a second, and answered at once when there is who can.
    assert start_up <= answered < start_up + 1.0


def test_twenty_shrinks_of_a_busy_worker_lose_nothing(start: Start, ledger_path: Path) -> None:
    worker = start()
    names = [f"n{number}" for number in range(500)]
    sent = [scaled.infer.delay(name, 0.6) for name in names]
    for shrinks in range(20):
        tell(worker, max=3 * UNIT, min=3 * UNIT)
        # Each time two others come, and have begun an input each.
        at_work = partial(_have_begun, ledger_path, 3 + 2 * shrinks)
        eventually(at_work, 30)
        tell(worker, max=UNIT, min=UNIT)
    # All slots were full each time: 16 of what waits now were with the two that go last.
    assert len(ledger.words(ledger_path, "ended")) < len(names) - 16
    for one in sent:
        one.get(timeout=90)
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    assert worker.log_text().count("from 3 to 1 replicas") == 20
    eventually(lambda: pooling.wrote(ledger_path, "left", "Model") == 40, 20)


def _have_begun(path: Path, count: int) -> bool:
    """Whether inputs have begun in so many processes."""
    return len({line[0] for line in ledger.words(path, "began")}) == count


def test_replicas_that_cannot_load_are_tried_ever_seldomer(start: Start, ledger_path: Path) -> None:
    env = {"FAIL": "1"}
    worker = start("--autoscale", "2,1", env=env, options={"wait_ready": False}, is_loaded=False)
    busy(40)
    eventually(lambda: pooling.wrote(ledger_path, "entering", "Model") >= 5, 60)
    began = time.monotonic()
    eventually(lambda: pooling.wrote(ledger_path, "entering", "Model") >= 7, 60)
    assert time.monotonic() - began > 1.0, "by then each waits for two or four seconds"
    assert [one["state"] for one in status(worker)["replicas"]].count("ready") == 0
    assert worker.log_text().count(" replicas: ") == 1


def tell(worker: WorkerProcess, **bounds: int) -> str:
    """What the worker answers to ``control autoscale``."""
    options: Any = {"reply": True, "destination": [worker.node], "timeout": 15, "limit": 1}
    (answer,) = scaled.celery.control.broadcast("autoscale", bounds, **options)
    return str(answer[worker.node])


def test_an_operator_changes_the_bounds_and_sees_what_was_decided(start: Start) -> None:
    worker = start()
    assert "autoscale now max=15 min=10" in tell(worker, max=11, min=6)
    eventually(lambda: states(worker) == ["ready"] * 2, 30)
    assert "give both" in tell(worker, max=UNIT)
    eventually(lambda: status(worker)["scaling"]["services"], 20)
    found = pooling.ask(worker, "stats", scaled.celery)["autoscaler"]
    assert (found["max"], found["min"], found["current"]) == (15, 10, 10)
    assert found["gw"]["services"]["scaled.infer"]["queued"] == 0
    eventually(lambda: status(worker)["scaling"]["desired"] == 2)
    seen = status(worker)["scaling"]
    assert (seen["least"], seen["most"], seen["actual"]) == (2, 3, 2)


# -- several workers --


def busy(count: int, app: Any = scaled.celery) -> None:
    """So many inputs that take longer than the test: four of them fill a replica."""
    for number in range(count):
        app.send_task("scaled.infer", (f"n{number}", 20.0), queue="cpu.infer")


def together(one: WorkerProcess, two: WorkerProcess) -> None:
    """Wait until each knows of the other."""
    eventually(lambda: status(one)["scaling"]["workers"] == 2, 30)
    eventually(lambda: status(two)["scaling"]["workers"] == 2, 30)


def settled(*workers: WorkerProcess, total: int) -> list[int]:
    """Their sizes, once they have had as many for three seconds; they never have more meanwhile."""
    since: list[float] = []

    def look() -> list[int]:
        found = [size(one) for one in workers]
        assert sum(found) <= total, f"{found} are more than {total}"
        if sum(found) < total:
            since.clear()
            return []
        since.append(time.monotonic())
        return found if since[-1] - since[0] > 3 else []

    return eventually(look, 60)


def test_two_workers_do_not_both_scale_for_the_whole_queue(start: Start) -> None:
    one, two = start("--autoscale", "4,1"), start("--autoscale", "4,1")
    together(one, two)
    busy(16)
    assert settled(one, two, total=4) == [2, 2]


def test_what_a_killed_worker_should_have_done_is_done_by_the_others(start: Start) -> None:
    one, two = start("--autoscale", "4,1"), start("--autoscale", "4,1")
    together(one, two)
    os.kill(two.pid, signal.SIGKILL)
    busy(12)
    eventually(lambda: status(one)["scaling"]["workers"] == 1, 30)
    assert settled(one, total=3) == [3]


@pytest.fixture
def on_rabbitmq(rabbitmq_url: str) -> Iterator[Any]:
    with pooling.client(rabbitmq_url, "rpc://") as app:
        yield app


def test_without_redis_workers_divide_a_queue_by_its_consumers(
    start: Start, rabbitmq_url: str, on_rabbitmq: Any
) -> None:
    options = {"broker": rabbitmq_url, "result": "rpc://"}
    workers = [start(options=options), start(options=options)]

    def share(worker: WorkerProcess) -> float:
        seen = status(worker, on_rabbitmq)["scaling"]["services"]
        return float(seen["scaled.infer"]["share"]) if seen else 0.0

    eventually(lambda: [share(worker) for worker in workers] == [0.5, 0.5], 30)
    busy(16, on_rabbitmq)
    # Each rounds its part up, and neither knows of what the other has taken.
    eventually(lambda: sum(size(one, on_rabbitmq) for one in workers) > 2, 40)
    assert sum(size(one, on_rabbitmq) for one in workers) <= 6
