"""Replicas that hang are replaced in time, and those that are never well restart slowly."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import probed
import pytest

from tests import pooling, probing
from tests.outages import outage
from tests.probing import Site, probe
from tests.processes import (
    StartWorker,
    WorkerProcess,
    eventually,
    is_alive,
    logged_at,
    workers,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(8)]
PERIOD, TIMEOUT, FAILURES = 1.0, 1.0, 2
#: Within which a hung replica is replaced.
BOUND = PERIOD * FAILURES + TIMEOUT + 5.0
#: What the worker says of a replica that its probe, and nothing else, has ended.
GIVEN_UP = r"ended while ready, .*: its liveness probe Model\.lives failed \(2 of 2 in a row: no an"


@pytest.fixture
def site(start_worker: StartWorker, tmp_path: Path) -> Site:
    return Site(start_worker, tmp_path)


def liveness(method: str) -> dict[str, Any]:
    return probe(method, "liveness", period_s=PERIOD, timeout_s=TIMEOUT, failures=FAILURES)


def by_pid(worker: WorkerProcess) -> dict[int, int]:
    """The numbers of the replicas by their processes, of those that live."""
    return {
        one["pid"]: one["number"] for one in probing.replicas(worker) if is_alive(one["pid"] or 0)
    }


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("lives", "hang"),
        ("lives", "block"),
        ("lives", "gil"),
        ("lives_in_thread", "sleep"),
        ("lives_in_thread", "gil"),
    ],
)
def test_a_replica_whose_liveness_probe_hangs_is_replaced_and_its_inputs_finish_elsewhere(
    site: Site, method: str, how: str
) -> None:
    worker = site.start(liveness(method), replicas=2)
    probing.pids(worker, 2)
    sent = [probed.Model().rest.delay(name, 3.0) for name in NAMES]
    eventually(lambda: all(site.began(NAMES).values()), 20)
    victim = site.began(NAMES)["n0"][0]
    hers = [name for name, pids in site.began(NAMES).items() if pids == [victim]]
    assert len(hers) == 4
    number = by_pid(worker)[victim]
    site.switch(method, f"pid={victim} {how}")
    hung = time.time()
    eventually(lambda: not is_alive(victim), BOUND)
    (successor,) = eventually(lambda: [pid for pid, n in by_pid(worker).items() if n == number], 20)
    # READY in its place: there is no model to load.
    eventually(lambda: f"(pid {successor}) is ready" in worker.log_text(), 20)
    assert logged_at(worker, f"(pid {successor}) is ready") - hung < BOUND
    assert sorted(one.get(timeout=40) for one in sent) == NAMES
    others = site.began(hers)
    assert all(victim not in pids[1:] and len(pids) <= 2 for pids in others.values())
    assert f"its liveness probe Model.{method} failed (2 of 2 in a row: no answer" in (
        worker.log_text()
    )


def test_a_replica_whose_loop_an_input_blocks_is_replaced(site: Site) -> None:
    worker = site.start(liveness("lives"), replicas=2)
    probing.pids(worker, 2)
    probed.Model().block.delay("blocks", 600.0)
    (victim,) = eventually(lambda: pooling.began(site.ledger, "blocks"), 20)
    eventually(lambda: not is_alive(victim), BOUND)
    assert probed.Model().rest.delay("works").get(timeout=20) == "works"
    assert re.search(GIVEN_UP, worker.log_text())


def test_a_frozen_replica_is_replaced_by_its_probe_before_its_heartbeat(site: Site) -> None:
    worker = site.start(liveness("lives"))
    (victim,) = probing.pids(worker)
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: not is_alive(victim), BOUND)
    eventually(lambda: probing.pids(worker) != [victim], 20)
    assert re.search(GIVEN_UP, worker.log_text())


def test_a_probe_that_always_fails_never_restarts_faster_than_the_backoff(site: Site) -> None:
    site.switch("lives", "raise")
    # Long enough after READY that a death would count as one of the input's or by chance.
    worker = site.start(probe("lives", "liveness", period_s=1.0, failures=2), is_loaded=False)
    starts = eventually(
        lambda: times if len(times := list(site.times("lives").values())) >= 4 else [], 40
    )
    gaps = [after[0] - before[-1] for before, after in itertools.pairwise(starts[:4])]
    assert [gap >= least for gap, least in zip(gaps, (1, 2, 4), strict=True)] == [True] * 3, gaps
    assert all(len(calls) == 2 for calls in starts[:3])
    (one,) = eventually(lambda: [one for one in probing.replicas(worker) if one["last_error"]], 20)
    assert "its liveness probe Model.lives failed (2 of 2 in a row: OSError" in one["last_error"]
    site.switch("lives", "ok")
    probing.pids(worker)
    assert probed.Model().rest.delay("works").get(timeout=90) == "works"


def test_a_broker_that_is_away_fails_no_probe(tmp_path: Path) -> None:
    with outage(tmp_path / "broker") as broker:
        urls = (broker.server.broker_url, broker.server.result_url)
        with workers(tmp_path, *urls) as start_worker:
            site = Site(start_worker, tmp_path)
            probes = (
                probe("lives", "liveness", timeout_s=0.5, failures=1),
                probe("is_ready", "readiness", timeout_s=0.5, failures=1),
            )
            worker = site.start(*probes, settings={"broker_connection_timeout": 1})
            (pid,) = eventually(lambda: list(site.times("is_ready")), 20)
            broker.stop()
            eventually(lambda: "Connection to broker lost" in worker.log_text(), 20)
            eventually(lambda: worker.log_text().count("Trying again") >= 3, 30)
            broker.start()
            asked = len(site.times("lives").get(pid, ()))
            eventually(lambda: len(site.times("lives").get(pid, ())) > asked + 2, 30)
            assert list(site.times("lives")) == [pid]
            assert " failed (" not in worker.log_text()
