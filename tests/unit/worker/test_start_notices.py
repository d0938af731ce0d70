from __future__ import annotations

import pytest
from celery import Celery

import gw_celery as gw
from gw_celery import conf
from gw_celery.worker import serving, start_notices


@pytest.fixture
def declared(app: gw.App) -> gw.App:
    @app.remote(timeout=None)
    async def endless(): ...

    @app.remote(timeout=None, acks_late=False)
    async def acknowledged(): ...

    @app.remote
    async def limited(): ...

    return app


def said(app: Celery, declared: gw.App, caplog: pytest.LogCaptureFixture) -> str:
    served = list(declared.registry.services.values())
    plan = serving.Plan(
        registries=[declared.registry], served=served, settings=conf.Settings(), pool="prefork"
    )
    start_notices._log_unlimited(app, plan)
    return caplog.text


def test_only_tasks_that_redis_would_deliver_again_are_named(celery_app, declared, caplog) -> None:
    celery_app.conf.update(
        broker_url="redis://localhost", broker_transport_options={"visibility_timeout": 7200}
    )
    text = said(celery_app, declared, caplog)

    assert f"no time limit: {__name__}.endless. Redis" in text
    assert "['visibility_timeout']=7200 s" in text


def test_a_broker_that_waits_for_as_long_as_it_takes_is_no_reason_to_warn(
    celery_app, declared, caplog
) -> None:
    assert said(celery_app, declared, caplog) == ""


@pytest.mark.parametrize(("pool", "is_said"), [("prefork", True), (serving.GPU_POOL, False)])
def test_the_memory_of_a_service_acts_on_the_gpu_pool_only(
    app: gw.App, caplog: pytest.LogCaptureFixture, pool: str, is_said: bool
) -> None:
    @app.remote(gpu=gw.Gpu("A100", memory_gb=10))
    async def embed(): ...

    served = list(app.registry.services.values())
    plan = serving.Plan(
        registries=[app.registry], served=served, settings=conf.Settings(), pool=pool
    )
    start_notices._log_what_waits(plan)
    assert ("embed: memory_gb" in caplog.text) is is_said


@pytest.mark.parametrize("is_declared", [True, False])
def test_bounds_that_the_worker_does_not_go_by_are_named_with_what_it_goes_by(
    app: gw.App, caplog: pytest.LogCaptureFixture, is_declared: bool
) -> None:
    @app.remote(max_workers=3)
    async def embed(): ...

    plan = serving.Plan(
        registries=[app.registry],
        served=list(app.registry.services.values()),
        settings=conf.Settings(),
        pool=serving.GPU_POOL,
        has_declared_bounds=is_declared,
    )
    start_notices._log_what_waits(plan)
    said = "which was given its size (--replicas, --autoscale, -c, gw_replicas): embed: max_workers"
    assert (said in caplog.text) is not is_declared
