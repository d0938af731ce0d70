"""The examples for Kubernetes name what there is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from gw_celery.contrib import prometheus
from gw_celery.protocol import snapshot
from tests.processes import ROOT

EXAMPLES = sorted((ROOT / "docs" / "kubernetes").glob("*.yaml"))
#: The rest of what the pages call ``gw_...``.
NAMES = {"gw_celery", "gw_status", "gw_probe_tick", "gw_benchmark_tick", "gw_best_score"}


def exported() -> set[str]:
    """The names of all metrics, as a query has them."""
    scaling = snapshot.Scaling(least=0, most=1)
    worker = snapshot.Worker(hostname="w", scaling=scaling)
    suffixes = {"counter": "_total", "info": "_info"}
    return {
        one.name + suffixes.get(one.type, "")
        for one in prometheus.Page(lambda: worker, {}).collect()
    }


def settings() -> dict[str, str]:
    """The default of each setting by its name, which tests/unit/test_docs.py compares with code."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    return dict(re.findall(r"^\| `(gw_\w+)` \| .+?, `([^`]+)` \|", text, re.MULTILINE))


def documents() -> list[dict[str, Any]]:
    return [one for path in EXAMPLES for one in yaml.safe_load_all(path.read_text())]


def found(kind: str) -> dict[str, Any]:
    """The only document of this kind."""
    (document,) = [one for one in documents() if one.get("kind") == kind]
    return document


def mentioned(text: str) -> set[str]:
    return set(re.findall(r"\bgw_\w*[a-z]", text))


def test_the_examples_are_there_and_parse() -> None:
    values = "prometheus-adapter"  # for Helm
    assert {path.stem for path in EXAMPLES} == {"alerts", "hpa", "keda", values, "workers"}
    for path in EXAMPLES:
        for document in yaml.safe_load_all(path.read_text()):
            can_be_applied = {"apiVersion", "kind", "metadata", "spec"} <= set(document)
            assert can_be_applied == (path.stem != values)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_only_metrics_and_settings_that_exist(path: Any) -> None:
    assert mentioned(path.read_text()) <= exported() | settings().keys()


@pytest.mark.parametrize("page", ["cluster.md", "kubernetes.md"])
def test_the_pages_name_only_what_exists(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert mentioned(text) <= exported() | settings().keys() | NAMES


def test_every_metric_is_documented() -> None:
    assert exported() <= mentioned((ROOT / "docs" / "cluster.md").read_text())


def test_every_expression_reads_a_metric() -> None:
    rules = found("PrometheusRule")["spec"]["groups"][0]["rules"]
    triggers = found("ScaledObject")["spec"]["triggers"]
    queries = [one["metadata"]["query"] for one in triggers if one["type"] == "prometheus"]
    for expression in (*queries, *(rule["expr"] for rule in rules)):
        assert mentioned(expression) <= exported()
        assert mentioned(expression)


def test_both_scalers_scale_the_deployment_by_what_all_workers_want() -> None:
    name = found("Deployment")["metadata"]["name"]
    keda, hpa = found("ScaledObject")["spec"], found("HorizontalPodAutoscaler")["spec"]
    assert keda["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == name
    (trigger,) = [one["metadata"] for one in keda["triggers"] if one["type"] == "prometheus"]
    (metric,) = [one["external"] for one in hpa["metrics"]]
    assert trigger["query"].startswith("sum(gw_wanted_replicas{")
    (adapted,) = [
        one for document in documents() for one in document.get("rules", {}).get("external", ())
    ]
    assert metric["metric"]["name"] == adapted["name"]["as"]
    assert trigger["threshold"] == metric["target"]["averageValue"]


def test_a_pod_holds_as_many_replicas_as_its_scalers_count_on() -> None:
    (container,) = found("Deployment")["spec"]["template"]["spec"]["containers"]
    (scale,) = [one for one in container["args"] if one.startswith("--autoscale=")]
    threshold = found("ScaledObject")["spec"]["triggers"][0]["metadata"]["threshold"]
    assert scale.removeprefix("--autoscale=").split(",")[0] == threshold
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == threshold


def test_a_pod_is_given_the_time_that_its_worker_takes_to_stop() -> None:
    grace = found("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    text = (ROOT / "docs" / "kubernetes" / "workers.yaml").read_text()
    said = {name: int(value) for name, value in re.findall(r"gw_(\w+_timeout) (\d+)", text)}
    assert said["exit_timeout"] == float(settings()["gw_exit_timeout"])
    assert said["shutdown_timeout"] + 2 * said["exit_timeout"] + 15 < grace


def test_a_pod_is_given_the_time_that_its_first_replica_takes_to_be_ready() -> None:
    (container,) = found("Deployment")["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    needed = sum(float(settings()[f"gw_{name}_timeout"]) for name in ("boot", "start", "benchmark"))
    assert probe["periodSeconds"] * probe["failureThreshold"] > needed


def test_celery_is_the_first_process_of_its_container() -> None:
    (container,) = found("Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "celery"


def test_what_probes_and_scrapes_ask_is_the_port_that_is_there() -> None:
    (container,) = found("Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {one["name"] for one in container["ports"]}
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    (scraped,) = found("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert {one["port"] for one in probes} | {scraped["port"]} == ports
    text = (ROOT / "docs" / "kubernetes" / "workers.yaml").read_text()
    assert f"gw_health_port = {container['ports'][0]['containerPort']}" in text
    paths = [one["path"] for one in probes]
    assert paths == ["/startupz", "/livez", "/readyz"]
    assert scraped["path"] == "/metrics"
