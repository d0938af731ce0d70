from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gw_celery.protocol import snapshot
from gw_celery.worker import metrics

RENDERER = "gw_celery.contrib.prometheus"


def worker(**given: Any) -> snapshot.Worker:
    return snapshot.Worker(hostname="gpu@node1", **given)


def test_a_scrape_shows_what_the_loop_saw_last_and_asks_nothing() -> None:
    pictures = [worker(ready_slots={"shop.Embedder": slots}) for slots in (4, 8)]
    route = metrics.Metrics(lambda: pictures.pop(0), {"shop.Embedder": "gpu.Embedder"})
    route.look()
    shown = 'gw_ready_slots{queue="gpu.Embedder",service="shop.Embedder"} '
    assert f"{shown}4.0" in route().body.decode()
    assert f"{shown}4.0" in route().body.decode()
    route.look()
    assert f"{shown}8.0" in route().body.decode()


def test_a_scrape_is_answered_as_prometheus_expects_it() -> None:
    reply = metrics.Metrics(worker, {})()
    assert reply.status == 200
    assert reply.content_type.startswith("text/plain; version=0.0.4")


def test_without_prometheus_client_a_scrape_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, RENDERER, raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    reply = metrics.Metrics(worker, {})()
    assert reply.status == 501
    assert b"pip install 'gw-celery[metrics]'" in reply.body


@pytest.mark.parametrize(("port", "is_there"), [(None, False), (0, True), (8081, True)])
def test_metrics_are_there_where_a_health_endpoint_is(port: int | None, is_there: bool) -> None:
    conf = {} if port is None else {"gw_health_port": port}
    started = SimpleNamespace(app=SimpleNamespace(conf=conf))
    assert metrics.MetricsStep.include_if(object.__new__(metrics.MetricsStep), started) is is_there


def test_the_step_has_the_loop_look_once_a_second() -> None:
    taken: list[snapshot.Worker] = []

    def take() -> snapshot.Worker:
        taken.append(worker(open_queues=("gpu.Embedder",)))
        return taken[-1]

    pool = SimpleNamespace(health=SimpleNamespace(routes={}, watchers=[]), snapshot=take)
    started = SimpleNamespace(pool=pool, hostname="gpu@node1", autoscaler=None)
    step = object.__new__(metrics.MetricsStep)
    step.queues = {}
    step.start(started)
    assert len(taken) == 1
    (watcher,) = pool.health.watchers
    watcher()
    assert len(taken) == 2
    assert b'gw_queue_open{queue="gpu.Embedder"} 1.0' in pool.health.routes["/metrics"]().body
