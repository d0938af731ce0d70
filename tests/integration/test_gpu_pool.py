"""The GPU pool serves: what is loaded, when messages are taken, and how many run at a time."""

from __future__ import annotations

from pathlib import Path

import ledger
import pooled
import psutil
import pytest

from gw_celery import testing
from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, eventually

pytestmark = pytest.mark.integration


def test_contexts_and_hooks_enter_once_in_each_child_and_leave_at_warm_shutdown(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled(replicas=2)
    assert [pooled.add.delay(x).get(timeout=20) for x in range(8)] == list(range(1, 9))
    assert worker.stop() == 0
    lines = ledger.read(ledger_path)
    pids = {line[0] for line in lines}
    assert len(pids) == 2
    for pid in pids:
        mine = [line[1:] for line in lines if line[0] == pid]
        assert sorted(mine[:3]) == [["entered", "Model"], ["entering", "Model"], ["opened"]]
        assert sorted(mine[3:]) == [["closed"], ["left", "Model"]]
    assert str(worker.pid) not in pids


def test_a_body_runs_only_where_everything_has_entered(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    sent = [pooled.four.delay(f"early{number}") for number in range(4)]
    start_pooled(env={"LOAD": "1"})
    assert [one.get(timeout=20) for one in sent] == [f"early{number}" for number in range(4)]
    words = [line[1] for line in ledger.read(ledger_path)]
    assert words.index("began") > words.index("entered")


def test_1000_asynchronous_inputs_are_in_flight_in_one_replica(start_pooled: StartPooled) -> None:
    start_pooled()
    sent = [pooled.meet.delay(1000) for _ in range(1000)]
    assert len({one.get(timeout=60) for one in sent}) == 1


def test_a_busy_service_starves_no_other(start_pooled: StartPooled, ledger_path: Path) -> None:
    # Six slots, and forty messages for one of them.
    start_pooled(queues="cpu.single,cpu.four,celery")
    backlog = [pooled.single.delay(f"b{number}", 0.2) for number in range(40)]
    eventually(lambda: pooling.wrote(ledger_path, "ended", "b2"))
    for number in range(5):
        assert pooled.four.delay(f"f{number}").get(timeout=5) == f"f{number}"
        assert pooled.plain.delay(number).get(timeout=5) == number + 1
    assert not backlog[-1].ready()
    assert [one.get(timeout=30) for one in backlog] == [f"b{number}" for number in range(40)]
    ended = [line[2] for line in ledger.words(ledger_path, "ended") if line[2].startswith("b")]
    assert ended == [f"b{number}" for number in range(40)]
    # Its queue was closed while it was full.
    assert pooled.single.delay("after").get(timeout=10) == "after"


def test_replicas_share_the_inputs_of_a_service(start_pooled: StartPooled) -> None:
    start_pooled(replicas=2)
    # Two loads of four: only both replicas together hold them all.
    sent = [pooled.four.delay(f"n{number}", 1.0) for number in range(8)]
    assert [one.get(timeout=20) for one in sent] == [f"n{number}" for number in range(8)]


def test_ping_stats_and_shutdown_work_while_a_model_loads(
    start_pooled: StartPooled, redis_server: testing.Server, ledger_path: Path
) -> None:
    sent = pooled.four.delay("waits")
    worker = start_pooled(env={"LOAD": "60"}, is_loaded=False)
    eventually(lambda: pooling.wrote(ledger_path, "entering", "Model"), 20)
    assert pooling.ask(worker, "ping") == {"ok": "pong"}
    # What stats shows is a picture of a second ago.
    eventually(lambda: pooling.replicas(worker)[0]["state"] == "entering", 5)
    assert pooling.ask(worker, "active_queues") == []
    assert pooling.queued(redis_server, "cpu.four") == 1
    assert not sent.ready()
    assert worker.stop() == 0


def test_the_queues_open_once_the_model_has_loaded(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    sent = pooled.four.delay("waits")
    worker = start_pooled(env={"LOAD": "3"}, is_loaded=False)
    pooling.wait_loaded(worker)
    assert sent.get(timeout=20) == "waits"
    names = {queue["name"] for queue in pooling.ask(worker, "active_queues")}
    assert {"celery", "cpu.four", "cpu.Desk"} <= names


def test_a_worker_whose_model_cannot_load_takes_no_message_and_says_so(
    start_pooled: StartPooled, redis_server: testing.Server, ledger_path: Path
) -> None:
    sent = pooled.four.delay("waits")
    worker = start_pooled(env={"FAIL": "raise"}, is_loaded=False)
    eventually(lambda: pooling.wrote(ledger_path, "entering", "Model") >= 3, 30)
    eventually(lambda: pooling.replicas(worker)[0]["restarts"] >= 2, 5)
    (replica,) = pooling.replicas(worker)
    assert "the weights are not there" in replica["last_error"]
    assert "the weights are not there" in worker.log_text()
    assert pooling.ask(worker, "active_queues") == []
    assert pooling.queued(redis_server, "cpu.four") == 1
    assert not sent.ready()
    assert worker.stop() == 0


def test_sleeping_inputs_do_not_keep_a_worker_busy(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    worker = start_pooled()
    pooled.hold.delay("sleeps", 3.0)
    eventually(lambda: pooling.began(ledger_path, "sleeps"))
    before = _cpu_seconds(worker)
    eventually(lambda: pooling.wrote(ledger_path, "ended", "sleeps"), interval=0.5)
    assert _cpu_seconds(worker) - before < 1.0


def _cpu_seconds(worker: WorkerProcess) -> float:
    used = [psutil.Process(pid).cpu_times() for pid in (worker.pid, *worker.children())]
    return sum(one.user + one.system for one in used)


def test_the_tasks_of_a_project_run_on_this_pool_unchanged(start_pooled: StartPooled) -> None:
    start_pooled()
    assert pooled.plain.delay(1).get(timeout=20) == 2
    sent = pooled.plain_who.delay()
    assert sent.get(timeout=20) == (sent.id, sent.id, False)
    assert pooled.plain_retried.delay(2).get(timeout=20) == 2
    with pytest.raises(ValueError, match="as it is"):
        pooled.plain_fails.delay("as it is").get(timeout=20)
    sent = pooled.plain.apply_async((1,), countdown=0.5)
    assert sent.get(timeout=20) == 2


def test_two_workers_share_a_backlog_that_came_before_the_second(
    start_pooled: StartPooled, ledger_path: Path
) -> None:
    first = start_pooled(queues="cpu.single")
    names = [f"n{number}" for number in range(20)]
    sent = [pooled.single.delay(name, 0.3) for name in names]
    eventually(lambda: pooling.began(ledger_path, "n0"))
    # Two slots, one of them for plain tasks: nothing more is kept from others.
    assert len(pooling.ask(first, "reserved")) <= 4
    start_pooled(queues="cpu.single")
    assert [one.get(timeout=30) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    assert len({pooling.began(ledger_path, name)[0] for name in names}) == 2
