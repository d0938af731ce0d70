"""Remote control of the GPU pool: its size, restarts and queues, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pooled
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually, is_alive

pytestmark = pytest.mark.integration

NAMES = [f"n{number}" for number in range(9)]


def slots(worker: WorkerProcess) -> int:
    return int(pooling.ask(worker, "stats")["pool"]["max-concurrency"])


def test_stats_tell_of_slots_replicas_and_children(start_pooled: StartPooled) -> None:
    worker = start_pooled(replicas=2, extra_args=["--time-limit", "100"])
    pids = set(pooling.pids_of_all(worker, 2))
    pool = pooling.ask(worker, "stats")["pool"]
    assert pool["implementation"] == "gw_celery.pool.taskpool:TaskPool"
    assert set(pool["processes"]) == pids <= set(worker.children())
    assert pool["timeouts"] == [0, 100]
    first, second = pool["gw_replicas"]
    assert (first["number"], second["number"]) == (0, 1)
    assert first["slots"] + second["slots"] == pool["max-concurrency"]
    assert pooling.ask(worker, "stats")["prefetch_count"] == pool["max-concurrency"]


def test_grow_adds_a_replica_and_shrink_drains_one_with_nothing_lost(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    one = slots(worker)
    pooling.tell(worker, "pool_grow", n=one)
    eventually(lambda: len(pooling.ready_pids(worker)) == 2, 20)
    assert slots(worker) == 2 * one
    sent = [pooled.four.delay(name, 1.0) for name in NAMES]
    eventually(lambda: len(pooling.ask(worker, "active")) == 8)
    pooling.tell(worker, "pool_shrink", n=one)
    assert [one.get(timeout=20) for one in sent] == NAMES
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    eventually(lambda: len(pooling.replicas(worker)) == 1, 20)
    assert slots(worker) == one
    assert len(pooling.ask(worker, "stats")["pool"]["processes"]) == 1
    assert pooling.wrote(ledger_path, "left", "Model") == 1
    eventually(lambda: pooling.ask(worker, "stats")["prefetch_count"] == one)


@pytest.mark.parametrize("name", ["plain_rest", "unlimited"])
def test_a_shrink_waits_for_what_has_no_time_limit_and_says_so(
    name: str, start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"gw_drain_timeout": 0.5})
    sent = getattr(pooled, name).delay("long", 4.0)
    eventually(lambda: pooling.began(ledger_path, "long"), 20)
    pooling.tell(worker, "pool_shrink", n=slots(worker))
    assert sent.get(timeout=20) == "long"
    assert pooling.counts(ledger_path, ["long"]) == pooling.all_once(["long"])
    eventually(lambda: pooling.replicas(worker) == [], 20)
    assert f"no time limit, pooled.{name}[{sent.id}]" in worker.log_text()


def test_a_worker_shrunk_to_nothing_takes_no_message_until_it_grows(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    one = slots(worker)
    pooling.tell(worker, "pool_shrink", n=one)
    eventually(lambda: pooling.replicas(worker) == [])
    assert pooling.ask(worker, "active_queues") == []
    sent = pooled.four.delay("waits")
    assert pooling.ask(worker, "reserved") == []
    pooling.tell(worker, "pool_grow", n=one)
    assert sent.get(timeout=20) == "waits"


def test_a_restart_replaces_every_child_in_turn_with_nothing_lost(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2, settings={"worker_pool_restarts": True})
    before = pooling.pids_of_all(worker, 2)
    sent = [pooled.four.delay(name, 1.0) for name in NAMES]
    eventually(lambda: len(pooling.ask(worker, "active")) == 8)
    pooling.tell(worker, "pool_restart")
    assert [one.get(timeout=20) for one in sent] == NAMES
    eventually(lambda: not set(before) & set(pooling.ready_pids(worker)), 20)
    eventually(lambda: len(pooling.ready_pids(worker)) == 2, 20)
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    eventually(lambda: not any(map(is_alive, before)))
    assert pooling.wrote(ledger_path, "left", "Model") == 2


def test_a_service_is_served_through_a_restart(start_pooled: StartPooled) -> None:
    worker = start_pooled(replicas=2, settings={"worker_pool_restarts": True})
    before = set(pooling.pids_of_all(worker, 2))
    pooling.tell(worker, "pool_restart")

    def is_restarted() -> bool:
        assert pooled.add.delay(1).get(timeout=5) == 2
        ready = set(pooling.ready_pids(worker))
        return len(ready) == 2 and not before & ready

    eventually(is_restarted, 30)


def test_a_cancelled_queue_stays_closed_when_a_child_is_replaced(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"worker_pool_restarts": True})
    before = pooling.ready_pid(worker)
    pooled.celery.control.cancel_consumer("cpu.four", destination=[worker.node], reply=True)
    pooling.tell(worker, "pool_restart")
    eventually(lambda: pooling.ready_pids(worker) not in ([], [before]), 20)
    assert pooled.add.delay(1).get(timeout=20) == 2
    sent = pooled.four.delay("later")
    assert "cpu.four" not in _consumed(worker)
    assert not sent.ready()
    pooled.celery.control.add_consumer("cpu.four", destination=[worker.node], reply=True)
    assert sent.get(timeout=20) == "later"


def _consumed(worker: WorkerProcess) -> set[str]:
    return {queue["name"] for queue in pooling.ask(worker, "active_queues")}


def test_a_queue_added_at_run_time_is_served_and_opens_again_after_a_restart(
    start_pooled: StartPooled,
) -> None:
    worker = start_pooled(settings={"worker_pool_restarts": True})
    before = pooling.ready_pid(worker)
    pooled.celery.control.add_consumer("extra", destination=[worker.node], reply=True)
    assert pooled.plain.apply_async((1,), queue="extra").get(timeout=20) == 2
    pooling.tell(worker, "pool_restart")
    eventually(lambda: pooling.ready_pids(worker) not in ([], [before]), 20)
    assert pooled.plain.apply_async((2,), queue="extra").get(timeout=20) == 3


def test_a_worker_wide_limit_holds_for_tasks_without_one(start_pooled: StartPooled) -> None:
    start_pooled(extra_args=["--soft-time-limit", "1", "--time-limit", "20"])
    sent: Any = pooled.celery.tasks["pooled.plain_rest"].delay("plain", 1.5)
    with pytest.raises(SoftTimeLimitExceeded):
        sent.get(timeout=20)


@pytest.mark.parametrize(
    "arguments",
    [
        {"queue": {"not": "a name"}},
        {"queue": "odd", "consumer_arguments": [1]},
        {"queue": "odd", "exchange_type": "nonsense"},  # found out after the answer
        {"queue": "odd", "queue_arguments": {"x-expires": "soon"}, "expires": 1e300},
    ],
)
def test_a_command_that_cannot_be_carried_out_ends_no_worker(
    start_pooled: StartPooled, arguments: dict[str, Any]
) -> None:
    worker = start_pooled()
    pooling.tell(worker, "add_consumer", **arguments)
    broadcast = pooled.celery.control.broadcast  # a worker that connects again may not hear it
    broadcast("cancel_consumer", {"queue": arguments["queue"]}, reply=True)
    assert pooled.add.delay(1).get(timeout=20) == 2
    eventually(lambda: broadcast("add_consumer", {"queue": "correct"}, reply=True), 20)
    sent = pooled.plain.apply_async((1,), queue="correct")
    assert sent.get(timeout=20) == 2, worker.log_tail()
    assert pooled.add.delay(2).get(timeout=20) == 3
    if "exchange_type" in arguments:
        assert "the command add_task_queue with ('odd', None, 'nonsense', None)" in (
            worker.log_text()
        )
