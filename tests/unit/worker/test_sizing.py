from __future__ import annotations

import types
from typing import Any

import pytest
from billiard import cpu_count

import gw_celery as gw
from gw_celery import conf, errors
from gw_celery.declare import registry
from gw_celery.worker import serving, sizing
from gw_celery.worker.asked import Asked


@pytest.fixture(autouse=True)
def _two_kinds_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "A100:3,L4")


@pytest.fixture
def declared(app: gw.App) -> gw.App:
    @app.remote(gpu=gw.Gpu("A100"))
    @gw.concurrent(max_inputs=4)
    async def generate(x): ...

    @app.remote(gpu=gw.Gpu("L4", memory_gb=12))
    async def embed(x): ...

    @app.remote(gpu=gw.Gpu("CPU"))
    async def tokenize(x): ...

    @app.remote
    async def anywhere(x): ...

    app.celery.finalize()
    return app


def plan_of(declared: gw.App, *queues: str, **settings: Any) -> serving.Plan:
    plan = serving.Plan(
        registries=[declared.registry],
        served=list(registry.serving([declared.registry], queues)),
        settings=conf.Settings(**settings),
        pool=serving.GPU_POOL,
        queues=queues,
    )
    return serving.dataclasses.replace(plan, allotment=sizing.allot(plan))


def fitted(
    plan: serving.Plan, asked: Asked | None = None, slots: Any = 5, **options: Any
) -> types.SimpleNamespace:
    """A worker of so many slots, after it was fitted."""
    worker = types.SimpleNamespace(concurrency=slots, options=options)
    sizing.fit(worker, plan, asked)
    return worker


GENERATE, EMBED, CPU = "gpu.A100.generate", "gpu.L4.embed", "cpu.tokenize"


# -- devices --


def test_each_replica_gets_its_devices(declared: gw.App) -> None:
    given = plan_of(declared, GENERATE).allotment
    assert given is not None
    assert [[one.token for one in share] for share in given.shares] == [
        ["GPU-fake-0"],
        ["GPU-fake-1"],
        ["GPU-fake-2"],
    ]


@pytest.mark.parametrize("queue", [CPU, "gpu.anywhere", "celery"])
def test_what_needs_no_kind_does_not_look_at_the_machine(
    declared: gw.App, monkeypatch: pytest.MonkeyPatch, queue: str
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "nonsense")
    assert plan_of(declared, queue).allotment is None


def test_a_kind_that_is_not_there_is_refused(
    declared: gw.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "T4")
    with pytest.raises(errors.ConfigurationError, match=r"needs 1 x A100 .* has 1 x T4"):
        plan_of(declared, GENERATE)


# -- Celery's own worker command: slots --


@pytest.mark.parametrize(("slots", "expected"), [(5, 5), (6, 6), (15, 15)])
def test_slots_that_fit_stay(declared: gw.App, slots: int, expected: int) -> None:
    assert fitted(plan_of(declared, GENERATE), slots=slots).concurrency == expected


def test_more_slots_than_fit_are_refused(declared: gw.App) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        fitted(plan_of(declared, GENERATE), slots=1600)
    assert "-c 1600, of 5 slots a replica: 320 replicas were asked for, and 3 fit" in str(
        caught.value
    )


@pytest.mark.parametrize("slots", [cpu_count(), "auto"])
def test_slots_that_nobody_asked_for_are_cut_to_what_fits(
    declared: gw.App, monkeypatch: pytest.MonkeyPatch, slots: Any
) -> None:
    monkeypatch.setattr(sizing, "cpu_count", lambda: 128)
    plan = plan_of(declared, EMBED)
    assert fitted(plan, slots="auto" if slots == "auto" else 128).concurrency == 4


def test_without_devices_slots_are_as_they_were(declared: gw.App) -> None:
    assert fitted(plan_of(declared, CPU), slots=99).concurrency == 99
    assert fitted(plan_of(declared, CPU), slots="auto").concurrency == "auto"


def test_the_setting_counts_replicas(declared: gw.App) -> None:
    assert fitted(plan_of(declared, GENERATE, replicas=2)).concurrency == 10
    assert fitted(plan_of(declared, CPU, replicas=7)).concurrency == 14
    with pytest.raises(errors.ConfigurationError, match="4 replicas were asked for, and 3 fit"):
        fitted(plan_of(declared, GENERATE, replicas=4))


def test_celerys_autoscale_counts_slots(declared: gw.App) -> None:
    worker = fitted(plan_of(declared, GENERATE), slots=2, autoscale=(15, 5))
    assert (worker.options["autoscale"], worker.concurrency) == ((15, 5), 2)
    with pytest.raises(errors.ConfigurationError, match="4 replicas were asked for"):
        fitted(plan_of(declared, GENERATE), autoscale=(16, 5))


# -- gw worker: replicas --


@pytest.mark.parametrize(
    ("queue", "asked", "settings", "slots"),
    [
        (GENERATE, Asked(), {}, 15),
        (GENERATE, Asked(replicas=2), {}, 10),
        (GENERATE, Asked(), {"replicas": 1}, 5),
        (GENERATE, Asked(replicas=3), {"replicas": 1}, 15),
        (EMBED, Asked(), {}, 4),
        (CPU, Asked(), {}, 2),
        (CPU, Asked(replicas=3), {}, 6),
    ],
)
def test_replicas_are_those_that_were_asked_for_or_as_many_as_fit(
    declared: gw.App, queue: str, asked: Asked, settings: dict[str, Any], slots: int
) -> None:
    assert fitted(plan_of(declared, queue, **settings), asked).concurrency == slots


def test_more_replicas_than_fit_are_refused(declared: gw.App) -> None:
    with pytest.raises(errors.ConfigurationError, match="4 replicas were asked for, and 3 fit"):
        fitted(plan_of(declared, GENERATE), Asked(replicas=4))


def test_autoscale_counts_replicas(declared: gw.App) -> None:
    worker = fitted(plan_of(declared, GENERATE), Asked(), autoscale=(3, 1))
    assert worker.options["autoscale"] == (15, 5)
    with pytest.raises(errors.ConfigurationError, match="4 replicas were asked for"):
        fitted(plan_of(declared, GENERATE), Asked(), autoscale=(4, 1))


# -- gw worker: queues --


@pytest.mark.parametrize(
    ("asked", "families"),
    [
        (Asked(gpu="A100"), ["gpu.A100"]),
        (Asked(gpu="CPU"), ["cpu"]),
        (Asked(), ["gpu", "gpu.A100", "gpu.L4"]),
        (Asked(names_queues=True), ["celery"]),
    ],
)
def test_a_worker_consumes_the_families_that_it_takes(
    declared: gw.App, asked: Asked, families: list[str]
) -> None:
    worker = types.SimpleNamespace(app=declared.celery)
    declared.celery.amqp.queues.select(["celery"])
    sizing.select_families(worker, asked, [declared.registry], conf.Settings())
    assert sorted(declared.celery.amqp.queues.consume_from) == families


def test_a_worker_for_the_cpu_does_not_look_at_the_gpus(
    declared: gw.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "nonsense")
    worker = types.SimpleNamespace(app=declared.celery)
    sizing.select_families(worker, Asked(gpu="CPU"), [declared.registry], conf.Settings())
    assert list(declared.celery.amqp.queues.consume_from) == ["cpu"]
