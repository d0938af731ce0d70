from __future__ import annotations

import types
from typing import Any

import pytest
from celery import Celery
from celery.worker import control

import gw_celery as gw
from gw_celery import errors
from gw_celery.worker import serving, startup


@pytest.fixture
def declared(app: gw.App) -> gw.App:
    @app.remote(gpu=gw.Gpu("A100"))
    async def embed(x): ...

    @app.cls(gpu=gw.Gpu("A100"))
    class Ranker:
        @gw.method()
        def rank(self, x): ...

    @app.remote(gpu=gw.Gpu("H100", 2))
    async def generate(x): ...

    @app.remote
    async def anywhere(x): ...

    app.celery.finalize()
    return app


def consumed(app: gw.App, *queues: str) -> list[str]:
    """The queues that a worker with ``-Q`` and these names consumes."""
    selected = app.celery.amqp.queues
    selected.select(queues)
    startup.expand_families(selected, [app.registry])
    return sorted(selected.consume_from)


def prepared(app: gw.App, *queues: str, pool: Any = "prefork") -> serving.Plan:
    app.celery.amqp.queues.select(queues)
    worker = types.SimpleNamespace(app=app.celery, pool_cls=pool, prefetch_multiplier=4)
    return startup.prepare(worker, [app.registry])


@pytest.fixture(autouse=True)
def _control_commands_stay(monkeypatch) -> None:
    for name in ("data", "meta"):
        monkeypatch.setattr(control.Panel, name, dict(getattr(control.Panel, name)))


def test_a_family_expands_to_the_queues_of_its_services(declared) -> None:
    assert consumed(declared, "gpu.A100") == ["gpu.A100.Ranker", "gpu.A100.embed"]
    assert consumed(declared, "gpu.H100x2") == ["gpu.H100x2.generate"]


def test_the_family_gpu_is_no_prefix(declared) -> None:
    assert consumed(declared, "gpu") == ["gpu.anywhere"]


def test_a_service_and_other_queues_are_consumed_as_they_are(declared) -> None:
    assert consumed(declared, "gpu.A100.embed", "celery") == ["celery", "gpu.A100.embed"]


@pytest.mark.parametrize("queue", ["gpu.T4", "cpu", "gpu.A100.gone"])
def test_a_family_without_a_service_is_refused_with_those_that_are(declared, queue) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        consumed(declared, queue)
    assert f"-Q {queue}: no service belongs to this family or queue" in str(caught.value)
    assert "gpu, gpu.A100, gpu.H100x2" in str(caught.value)


def test_a_worker_serves_what_its_queues_name(declared) -> None:
    plan = prepared(declared, "gpu.A100")

    assert [service.name for service in plan.served] == ["embed", "Ranker"]
    assert plan.pool == "prefork"
    assert plan.loads_in_children


def test_a_worker_of_other_queues_serves_nothing_and_is_left_alone(declared) -> None:
    before = declared.celery.conf.worker_proc_alive_timeout
    plan = prepared(declared, "celery", pool="eventlet")

    assert plan.served == []
    assert not plan.loads_in_children
    assert declared.celery.conf.worker_proc_alive_timeout == before


def test_apps_of_another_celery_app_are_not_served(declared) -> None:
    other = Celery("other", broker="memory://", set_as_current=False)
    other.finalize()
    for name in [name for name in other.tasks if not name.startswith("celery.")]:
        del other.tasks[name]
    other.amqp.queues.select(["gpu.A100.embed"])
    worker = types.SimpleNamespace(app=other, pool_cls="prefork", prefetch_multiplier=4)

    with pytest.raises(errors.ConfigurationError, match="none: is the module"):
        startup.prepare(worker, [declared.registry])


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "celery.concurrency.gevent:TaskPool"])
def test_a_pool_without_a_loop_is_refused_with_those_that_work(declared, pool) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        prepared(declared, "gpu.A100", pool=pool)
    assert "cannot serve embed, Ranker" in str(caught.value)
    assert "-P prefork, threads or solo" in str(caught.value)


@pytest.mark.parametrize(
    ("alias", "name"), [("prefork", "prefork"), ("solo", "solo"), ("threads", "threads")]
)
def test_a_pool_is_known_by_its_alias_and_by_its_class(declared, alias: str, name: str) -> None:
    from celery import concurrency

    assert prepared(declared, "gpu.A100", pool=alias).pool == name
    pool_cls = concurrency.get_implementation(alias)
    assert prepared(declared, "gpu.A100", pool=pool_cls).pool == name


def test_threads_load_in_the_worker_itself(declared) -> None:
    assert not prepared(declared, "gpu.A100", pool="threads").loads_in_children


def test_contradictions_are_refused_before_anything_starts(declared) -> None:
    declared.celery.conf.result_serializer = "json"
    with pytest.raises(errors.ConfigurationError, match="result_serializer"):
        prepared(declared, "gpu.A100")

    declared.celery.conf.gw_start_timout = 3
    with pytest.raises(errors.ConfigurationError, match="did you mean"):
        prepared(declared, "celery")


def test_a_queue_whose_service_is_not_loaded_is_refused_at_run_time(declared) -> None:
    prepared(declared, "gpu.A100.embed")
    answer = control.Panel.data["add_consumer"](None, "gpu.H100x2.generate")

    assert "this worker has not loaded its service; it serves gpu.A100.embed" in answer["error"]
    assert "-Q gpu.H100x2.generate" in answer["error"]
