"""Startup and readiness probes of real workers, and what they leave behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import probed
import pytest
import redis

from gw_celery import testing
from tests import pooling, probing
from tests.probing import Site, probe
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

NAMES = [f"n{number}" for number in range(20)]


@pytest.fixture
def site(start_worker: StartWorker, tmp_path: Path) -> Site:
    return Site(start_worker, tmp_path)


def state(worker: WorkerProcess) -> str:
    (found,) = probing.states(worker)
    return found


def test_a_replica_takes_nothing_before_its_startup_probe_passes(site: Site) -> None:
    site.switch("starts", "false")
    worker = site.start(
        probe("starts", "startup", failures=1000), probe("lives", "liveness"), is_loaded=False
    )
    eventually(lambda: state(worker) == "probing", 20)
    sent = probed.Model().rest.delay("early")
    eventually(lambda: len(site.times("starts") and next(iter(site.times("starts").values()))) > 3)
    assert probing.open_queues(worker) == set()
    assert site.began(["early"]) == {"early": []}
    assert site.times("lives") == {}
    (one,) = probing.replicas(worker)[0]["probes"][:1]
    assert (one["name"], one["kind"], one["is_ok"]) == ("Model.starts", "startup", False)
    assert "'said': 'false'" in one["detail"]
    site.switch("starts", "ok")
    assert sent.get(timeout=20) == "early"
    calls = sum(map(len, site.times("starts").values()))
    eventually(lambda: site.times("lives"), 20)
    assert sum(map(len, site.times("starts").values())) == calls


def test_a_startup_probe_that_fails_as_often_as_it_may_starts_another_process(site: Site) -> None:
    site.switch("starts", "raise")
    worker = site.start(probe("starts", "startup", failures=2), is_loaded=False)
    eventually(lambda: len(site.times("starts")) == 2, 30)
    first, second = list(site.times("starts").values())[:2]
    assert len(first) == 2
    assert second[0] - first[-1] >= 1.0
    eventually(lambda: probing.replicas(worker)[0]["restarts"] >= 1, 20)
    assert "startup probe Model.starts failed (2 of 2 in a row: OSError: the device fell off" in (
        worker.log_text()
    )
    site.switch("starts", "ok")
    assert probed.Model().rest.delay("works").get(timeout=30) == "works"


def test_what_is_not_ready_gets_no_new_input_and_the_other_worker_has_its_traffic(
    site: Site,
) -> None:
    readiness = probe("is_ready", "readiness", failures=1)
    sick, well = (site.start(readiness, node=node) for node in ("sick", "well"))
    (pid,), (other,) = probing.pids(sick), probing.pids(well)
    long = [probed.Model().rest.delay(name, 3.0) for name in NAMES[:8]]
    eventually(lambda: [pid] in site.began(NAMES[:8]).values(), 20)
    site.switch("is_ready", "node=sick false")
    eventually(lambda: "takes no inputs of probed.Model" in sick.log_text(), 20)
    eventually(lambda: "cpu.Model" not in probing.open_queues(sick), 20)
    held = list(site.began(NAMES[:8]).values()).count([pid])
    sent = [probed.Model().rest.delay(name, 0.1) for name in NAMES[8:]]
    assert [one.get(timeout=30) for one in sent] == NAMES[8:]
    assert site.began(NAMES[8:]) == {name: [other] for name in NAMES[8:]}
    # What it had begun, it finished.
    assert [one.get(timeout=30) for one in long] == NAMES[:8]
    began = list(site.began(NAMES[:8]).values())
    assert (began.count([pid]), began.count([other])) == (held, 8 - held)
    site.switch("is_ready", "node=well raise")
    eventually(lambda: "takes inputs of probed.Model" in sick.log_text().rpartition("no")[2], 20)
    eventually(lambda: "cpu.Model" not in probing.open_queues(well), 20)
    assert probed.Model().rest.delay("back").get(timeout=30) == "back"
    assert site.began(["back"]) == {"back": [pid]}


def test_inputs_that_wait_where_no_replica_is_ready_go_to_the_other_worker(site: Site) -> None:
    readiness = probe("is_ready", "readiness", failures=1)
    many = {"settings": {"worker_prefetch_multiplier": 8}}
    sick = site.start(readiness, node="sick", **many)
    probing.pids(sick)
    sent = [probed.Model().rest.delay(name, 2.0) for name in NAMES]
    eventually(lambda: sum(map(bool, site.began(NAMES).values())) == 4, 20)
    eventually(lambda: pooling.tell(sick, "gw_status")["waiting"], 20)
    site.switch("is_ready", "node=sick false")
    well = site.start(readiness, node="well", **many)
    (other,) = probing.pids(well)
    assert [one.get(timeout=40) for one in sent] == NAMES
    assert sum(pids == [other] for pids in site.began(NAMES).values()) >= len(NAMES) - 8


def test_on_rabbitmq_too_the_traffic_goes_to_the_worker_that_is_ready(
    start_worker: StartWorker, tmp_path: Path, rabbitmq_url: str, result_url: str
) -> None:
    site = Site(start_worker, tmp_path)
    readiness = probe("is_ready", "readiness", failures=1)
    many = {"settings": {"worker_prefetch_multiplier": 8}, "broker": rabbitmq_url}
    with pooling.client(rabbitmq_url, result_url) as app:
        sick = site.start(readiness, node="sick", **many)
        sent = [
            app.send_task("probed.Model.rest", (name, 2.0), queue="cpu.Model") for name in NAMES
        ]
        eventually(lambda: sum(map(bool, site.began(NAMES).values())) == 4, 20)
        site.switch("is_ready", "node=sick false")
        eventually(lambda: "takes no inputs of probed.Model" in sick.log_text(), 20)
        site.start(readiness, node="well", **many)
        (other,) = eventually(lambda: pooling.ready_pids(site.nodes["well"], app), 20)
        assert [one.get(timeout=60) for one in sent] == NAMES
    assert sum(pids == [other] for pids in site.began(NAMES).values()) >= len(NAMES) - 8


def test_a_service_beside_one_that_is_not_ready_is_served(site: Site) -> None:
    readiness = probe("is_ready", "readiness", failures=2)
    site.switch("is_ready", "false")
    worker = site.start(readiness, is_loaded=False)
    assert probed.other.delay("n0").get(timeout=30) == "n0"
    eventually(lambda: state(worker) == "ready", 20)
    assert probing.replicas(worker)[0]["unready"] == ["probed.Model"]
    assert probing.open_queues(worker) == {"cpu.other", "celery", "gw.control"}
    site.switch("is_ready", "ok")
    assert probed.Model().rest.delay("n1").get(timeout=30) == "n1"


def test_a_replica_whose_only_service_is_not_ready_is_unready_and_alive(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    site = Site(start_worker, tmp_path)
    site.switch("is_ready", "raise")
    worker = site.start(probe("is_ready", "readiness"), is_loaded=False, queues="cpu.Model")
    eventually(lambda: state(worker) == "unready", 20)
    eventually(lambda: probing.replicas(worker)[0]["probes"][0]["is_failing"], 20)
    (pid,) = site.times("is_ready")
    site.switch("is_ready", "ok")
    assert probing.pids(worker) == [pid]


def test_a_loop_that_an_input_blocks_is_told_of_with_its_task_and_line(site: Site) -> None:
    worker = site.start()
    sent = probed.Model().block.delay("blocks", 3.0)
    assert sent.get(timeout=30) is None
    told = eventually(lambda: re.search(r"event loop is .* late, .*", worker.log_text()), 20)
    culprit = rf"because of probed\.Model\.block\[{sent.id}\], at \S+probed\.py:\d+ in block;"
    assert re.search(culprit, told[0])
    assert worker.log_text().count("event loop is") == 1


def test_a_probe_takes_no_slot_and_needs_none(site: Site) -> None:
    worker = site.start(probe("lives", "liveness", period_s=0.2, timeout_s=30.0))
    (pid,) = probing.pids(worker)

    def calls() -> int:
        return len(site.times("lives").get(pid, ()))

    # All four slots are held: it is called on.
    held = [probed.Model().rest.delay(name, 4.0) for name in NAMES[:4]]
    eventually(lambda: all(site.began(NAMES[:4]).values()), 20)
    before = calls()
    eventually(lambda: calls() >= before + 5, 20)
    assert not any(one.ready() for one in held), "it waited for a slot"
    assert sorted(one.get(timeout=20) for one in held) == NAMES[:4]
    # A call of it hangs: all four slots are there.
    site.switch("lives", "hang")
    before = calls()
    eventually(lambda: calls() == before + 1, 20)
    held = [probed.Model().rest.delay(name, 4.0) for name in NAMES[4:8]]
    eventually(lambda: all(site.began(NAMES[4:8]).values()), 20)
    assert not any(one.ready() for one in held), "an input waited for it"
    assert sorted(one.get(timeout=20) for one in held) == NAMES[4:8]


def test_probes_leave_nothing_in_results_and_events(
    site: Site, redis_server: testing.Server
) -> None:
    with pooling.events("task-received", probed.celery) as seen:
        worker = site.start(
            probe("lives", "liveness", period_s=0.1),
            probe("is_ready", "readiness", period_s=0.1),
            extra_args=["-E"],
        )
        eventually(lambda: sum(map(len, site.times("lives").values())) > 5, 20)
        sent = probed.Model().rest.delay("n0", 0.5)
        more = [probed.Model().rest.delay(name, 0.5) for name in NAMES[1:4]]
        assert [one.get(timeout=20) for one in (sent, *more)] == NAMES[:4]
        eventually(lambda: sent.id in seen, 20)
    assert len(seen) == 4
    assert pooling.ask(worker, "stats", probed.celery)["total"] == {"probed.Model.rest": 4}
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as client:
        stored = [json.loads(client.get(key)) for key in client.keys("celery-task-meta-*")]
    assert sorted(one["result"] for one in stored) == NAMES[:4]
