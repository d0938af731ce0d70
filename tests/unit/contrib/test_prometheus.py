from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from prometheus_client import parser
from prometheus_client.core import Metric

from gw_celery.contrib import prometheus
from gw_celery.pool.replica import State
from gw_celery.protocol import snapshot
from tests.processes import environment

SERVICE, QUEUE = "shop.Embedder", "gpu.A100.Embedder"
TALLY = snapshot.Counters(
    arrived=9000.0,
    arrived_inputs=90,
    served=8700.0,
    served_inputs=85,
    waiting=100.0,
    waiting_inputs=2,
    running=200.0,
    running_inputs=3,
    mean=100.0,
)
DEMAND = snapshot.ServiceDemand(queued=40, waiting=4000.0, score=250.0, need=18.0, keep=20.0)
WORKER = snapshot.Worker(
    hostname="gpu@node1",
    replicas=(
        snapshot.Replica(number=0, state="ready", pid=7, restarts=2, lag=0.25, resident_bytes=1024),
        snapshot.Replica(number=1, state="ready", pid=8),
        snapshot.Replica(number=2, state="failed", restarts=5),
        snapshot.Replica(number=3, state="ready", pid=9, unready=(SERVICE,)),
    ),
    ready_slots={SERVICE: 8, "": 3},
    open_queues=(QUEUE,),
    closed_queues=("gpu.A100.Rerank",),
    tallies={SERVICE: TALLY, "": snapshot.Counters(arrived_inputs=3)},
    scores={SERVICE: snapshot.Score(value=250.0, drift=-0.1), "": snapshot.Score()},
    scaling=snapshot.Scaling(least=1, most=8, desired=3, workers=4, services={SERVICE: DEMAND}),
)


def families(worker: snapshot.Worker) -> dict[str, Metric]:
    text = prometheus.Page(lambda: worker, {SERVICE: QUEUE})().decode()
    return {one.name: one for one in parser.text_string_to_metric_families(text)}


def samples(worker: snapshot.Worker) -> dict[tuple[str, ...], float]:
    """The figures by their names and the values of their labels, in the order of the labels."""
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in families(worker).values()
        for one in family.samples
    }


def test_replicas_are_counted_by_state_and_no_state_is_left_out() -> None:
    seen = samples(WORKER)
    counts = {state.value: seen["gw_replicas", state.value] for state in State}
    assert counts.pop("ready") == 3
    assert counts.pop("failed") == 1
    assert set(counts.values()) == {0}


def test_a_service_shows_its_demand_its_score_and_what_it_could_do() -> None:
    shown = {key[0]: value for key, value in samples(WORKER).items() if key[1:] == (QUEUE, SERVICE)}
    assert shown == {
        "gw_queue_length": 40,
        "gw_backlog_workload": 1000,
        "gw_wanted_replicas": 5,
        "gw_waiting_workload": 100,
        "gw_waiting_inputs": 2,
        "gw_in_flight_workload": 200,
        "gw_in_flight_inputs": 3,
        "gw_arrived_workload_total": 9000,
        "gw_arrived_inputs_total": 90,
        "gw_served_workload_total": 8700,
        "gw_served_inputs_total": 85,
        "gw_score": 250,
        "gw_score_drift_ratio": -0.1,
        "gw_capacity": 500,
        "gw_ready_slots": 8,
    }


def test_what_is_not_known_is_left_out_and_not_zero() -> None:
    names = {key[0] for key in samples(WORKER) if key[1:] == ("", "plain")}
    unknown = {"gw_queue_length", "gw_backlog_workload", "gw_wanted_replicas", "gw_score"}
    assert "gw_arrived_inputs_total" in names
    assert not {*unknown, "gw_score_drift_ratio", "gw_capacity"} & names


def test_a_length_that_the_broker_does_not_tell_is_left_out() -> None:
    demand = dataclasses.replace(DEMAND, queued=None)
    scaling = snapshot.Scaling(least=1, most=8, services={SERVICE: demand})
    names = {key[0] for key in samples(dataclasses.replace(WORKER, scaling=scaling))}
    assert "gw_queue_length" not in names
    assert "gw_backlog_workload" in names


@pytest.mark.parametrize("workers", [1, 3, 1000])
def test_what_all_workers_want_is_what_the_demand_needs_however_many_they_are(workers: int) -> None:
    scaling = snapshot.Scaling(least=0, most=1, workers=workers, services={SERVICE: DEMAND})
    one = samples(dataclasses.replace(WORKER, scaling=scaling))
    assert workers * one["gw_wanted_replicas", QUEUE, SERVICE] == pytest.approx(20)


def test_the_scaler_shows_what_is_desired_and_possible() -> None:
    seen = samples(WORKER)
    assert seen["gw_desired_replicas",] == 3
    assert seen["gw_capacity_replicas",] == 8


def test_a_worker_without_the_autoscaler_claims_to_want_nothing() -> None:
    seen = families(dataclasses.replace(WORKER, scaling=None))
    assert not seen["gw_wanted_replicas"].samples
    assert "gw_desired_replicas" not in seen


def test_a_replica_without_a_child_shows_its_restarts_only() -> None:
    seen = samples(WORKER)
    assert {key[0] for key in seen if key[1:] == ("2",)} == {"gw_replica_restarts_total"}
    assert seen["gw_replica_restarts_total", "2"] == 5
    assert seen["gw_replica_loop_lag_seconds", "0"] == 0.25
    assert seen["gw_replica_resident_bytes", "0"] == 1024


def test_queues_are_shown_open_or_closed() -> None:
    seen = samples(WORKER)
    assert seen["gw_queue_open", "gpu.A100.Embedder"] == 1
    assert seen["gw_queue_open", "gpu.A100.Rerank"] == 0


def test_an_outage_is_shown() -> None:
    assert samples(WORKER)["gw_outage",] == 0
    away = snapshot.Worker(hostname="gpu@node1", outage="Connection refused")
    assert samples(away)["gw_outage",] == 1


def test_every_metric_has_our_prefix_a_type_and_a_help_text_that_is_a_sentence() -> None:
    for name, family in families(WORKER).items():
        assert name.startswith("gw_")
        assert family.type in ("counter", "gauge")
        assert family.documentation[0].isupper()
        assert family.documentation.endswith(".")


def test_a_page_looks_at_the_worker_at_each_scrape_and_not_before() -> None:
    looks: list[int] = []

    def seen() -> snapshot.Worker:
        looks.append(1)
        return WORKER

    page = prometheus.Page(seen, {})
    assert not looks
    page()
    page()
    assert len(looks) == 2


def test_without_prometheus_client_the_remedy_is_named_where_metrics_are_asked_for() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import gw_celery, gw_celery.contrib\n"
        "try:\n    from gw_celery.contrib import prometheus\n"
        "except gw_celery.errors.ConfigurationError as exc: print(exc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert "pip install 'gw-celery[metrics]'" in done.stdout


@pytest.mark.parametrize("name", ["a service", 'with "quotes"', "with\nlines", "with \\"])
def test_any_name_of_a_queue_survives(name: str) -> None:
    worker = snapshot.Worker(hostname=name, open_queues=(name,))
    assert samples(worker)["gw_queue_open", name] == 1
