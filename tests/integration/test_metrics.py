"""What Prometheus reads from a real worker."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

import pooled
import pytest
from prometheus_client import parser

from tests import pooling
from tests.pooling import StartPooled
from tests.processes import WorkerProcess, environment, eventually

pytestmark = [pytest.mark.integration, pytest.mark.one_celery]

SETTINGS = {"gw_health_port": 0}


def scrape(worker: WorkerProcess) -> dict[tuple[str, ...], float]:
    """The figures by their names and the values of their labels, in the order of the labels."""
    found = eventually(lambda: re.search(r"health is at (\S+)/livez", worker.log_text()), 20)
    with urllib.request.urlopen(f"{found[1]}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in parser.text_string_to_metric_families(text)
        for one in family.samples
    }


def test_a_worker_tells_what_it_has_served_and_could_serve(start_pooled: StartPooled) -> None:
    worker = start_pooled(settings=SETTINGS)
    labels = (pooled.four.gw_service.queue, pooled.four.gw_service.key)
    sent = [pooled.four.delay(f"n{number}") for number in range(9)]
    assert len([one.get(timeout=20) for one in sent]) == 9
    eventually(lambda: scrape(worker).get(("gw_served_inputs_total", *labels)) == 9, 20)
    seen = scrape(worker)
    assert seen["gw_arrived_inputs_total", *labels] == 9
    assert seen["gw_served_workload_total", *labels] == 9
    assert seen["gw_in_flight_inputs", *labels] == 0
    assert seen["gw_ready_slots", *labels] == 4
    assert seen["gw_replicas", "ready"] == 1
    assert seen["gw_queue_open", labels[0]] == 1
    assert seen["gw_replica_resident_bytes", "0"] > 1_000_000
    assert seen["gw_worker_info", worker.node] == 1
    assert not {key for key in seen if key[0] == "gw_desired_replicas"}


def test_a_worker_with_the_autoscaler_tells_what_is_wanted(start_pooled: StartPooled) -> None:
    slots = sum(one["slots"] for one in pooling.replicas(start_pooled(settings=SETTINGS)))
    scaled = [f"--autoscale={2 * slots},{slots}"]
    worker = start_pooled(settings=SETTINGS, extra_args=scaled)
    labels = (pooled.four.gw_service.queue, pooled.four.gw_service.key)
    eventually(lambda: ("gw_wanted_replicas", *labels) in scrape(worker), 20)
    seen = scrape(worker)
    assert (seen["gw_desired_replicas",], seen["gw_capacity_replicas",]) == (1, 2)
    assert seen["gw_queue_length", *labels] == seen["gw_backlog_workload", *labels] == 0
    sent = [pooled.four.delay(f"n{number}", 0.5) for number in range(80)]
    # More than this worker may ever have: that is what asks for another node.
    eventually(lambda: scrape(worker)["gw_wanted_replicas", *labels] > 2, 20)
    eventually(lambda: scrape(worker)["gw_desired_replicas",] == 2, 20)
    assert len([one.get(timeout=60) for one in sent]) == 80


def test_without_prometheus_client_the_worker_serves_and_a_scrape_says_what_to_install(
    start_pooled: StartPooled, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['prometheus_client'] = None")
    paths = f"{hidden}:{environment()['PYTHONPATH']}"
    worker = start_pooled(settings=SETTINGS, env={"PYTHONPATH": paths})
    with pytest.raises(urllib.error.HTTPError) as refused:
        scrape(worker)
    with refused.value as answer:
        assert answer.code == 501
        assert b"gw-celery[metrics]" in answer.read()
    assert pooled.four.delay("served").get(timeout=20) == "served"
