from __future__ import annotations

import types
from typing import Any

import pytest
from billiard import cpu_count
from celery import Celery

import gw_celery as gw
from gw_celery import conf, errors
from gw_celery.declare import registry
from gw_celery.worker import serving, sizing
from gw_celery.worker.options import WorkerOptions


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
    plan: serving.Plan,
    asked: WorkerOptions | None = None,
    slots: Any = 5,
    broker: str = "redis://",
    **options: Any,
) -> types.SimpleNamespace:
    """A worker of so many slots, after it was fitted."""
    app = Celery("sizing", broker=broker, set_as_current=False)
    worker = types.SimpleNamespace(concurrency=slots, options=options, app=app)
    worker.is_declared = sizing.fit(worker, plan, asked)
    return worker


GENERATE, EMBED, CPU = "gpu.A100.generate", "gpu.L4.embed", "cpu.tokenize"


# -- devices --


def test_each_replica_gets_its_devices(declared: gw.App) -> None:
    given = plan_of(declared, GENERATE).allotment
    assert given is not None
    assert [[device.token for device in share] for share in given.shares] == [
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
def test_slots_that_no_user_asked_for_are_cut_to_what_fits(
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
        (GENERATE, WorkerOptions(), {}, 15),
        (GENERATE, WorkerOptions(replicas=2), {}, 10),
        (GENERATE, WorkerOptions(), {"replicas": 1}, 5),
        (GENERATE, WorkerOptions(replicas=3), {"replicas": 1}, 15),
        (EMBED, WorkerOptions(), {}, 4),
        (CPU, WorkerOptions(), {}, 2),
        (CPU, WorkerOptions(replicas=3), {}, 6),
    ],
)
def test_replicas_are_those_that_were_asked_for_or_as_many_as_fit(
    declared: gw.App, queue: str, asked: WorkerOptions, settings: dict[str, Any], slots: int
) -> None:
    assert fitted(plan_of(declared, queue, **settings), asked).concurrency == slots


def test_more_replicas_than_fit_are_refused(declared: gw.App) -> None:
    with pytest.raises(errors.ConfigurationError, match="4 replicas were asked for, and 3 fit"):
        fitted(plan_of(declared, GENERATE), WorkerOptions(replicas=4))


def test_autoscale_counts_replicas(declared: gw.App) -> None:
    worker = fitted(plan_of(declared, GENERATE), WorkerOptions(), autoscale=(3, 1))
    assert worker.options["autoscale"] == (15, 5)
    with pytest.raises(errors.ConfigurationError, match="4 replicas were asked for"):
        fitted(plan_of(declared, GENERATE), WorkerOptions(), autoscale=(4, 1))


# -- gw worker: bounds --


def bounded(app: gw.App, *bounds: tuple[int, int | None], gpu: str = "A100") -> list[str]:
    """The queues of services that declare ``(min_workers, max_workers)``."""
    queues = []
    for number, (least, most) in enumerate(bounds):

        async def body(x): ...

        body.__name__ = body.__qualname__ = f"bounded{number}"
        app.remote(gpu=gw.Gpu(gpu), min_workers=least, max_workers=most)(body)
        queues.append(f"{gw.Gpu(gpu).family}.bounded{number}")
    app.celery.finalize()
    return queues


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([(1, 2)], (2, 1)),
        ([(0, 2)], (2, 0)),
        ([(2, None)], (3, 2)),
        ([(1, 2), (0, 3)], (3, 1)),
        ([(1, 2), (0, None)], (3, 1)),
        ([(0, 1), (2, 3)], (3, 2)),
        ([(4, 9)], (3, 3)),
    ],
)
def test_replicas_are_as_many_as_the_greediest_service_wants_and_the_neediest_keeps(
    app: gw.App, bounds: list[tuple[int, int | None]], expected: tuple[int, int]
) -> None:
    worker = fitted(plan_of(app, *bounded(app, *bounds)), WorkerOptions())
    slots = len(bounds) + 1
    assert worker.options["autoscale"] == tuple(slots * bound for bound in expected)
    assert worker.is_declared


@pytest.mark.parametrize(
    ("bounds", "expected"), [([(0, 4)], (4, 0)), ([(2, None)], (2, 2)), ([(1, 2), (0, 3)], (3, 1))]
)
def test_without_devices_bounds_are_those_that_are_declared(
    app: gw.App, bounds: list[tuple[int, int | None]], expected: tuple[int, int]
) -> None:
    worker = fitted(plan_of(app, *bounded(app, *bounds, gpu="CPU")), WorkerOptions())
    slots = len(bounds) + 1
    assert worker.options["autoscale"] == tuple(slots * bound for bound in expected)


def test_a_worker_that_may_go_to_zero_is_scaled_without_bounds(declared: gw.App) -> None:
    plan = plan_of(declared, GENERATE, inactivity_timeout=60.0)
    assert fitted(plan, WorkerOptions()).options["autoscale"] == (15, 0)


@pytest.mark.parametrize(
    ("asked", "settings"),
    [(None, {}), (WorkerOptions(replicas=2), {}), (WorkerOptions(), {"replicas": 2})],
)
def test_a_size_that_was_asked_for_stays(
    app: gw.App, asked: WorkerOptions | None, settings: dict[str, Any]
) -> None:
    plan = plan_of(app, *bounded(app, (1, 3)), **settings)
    worker = fitted(plan, asked, slots=4)
    assert "autoscale" not in worker.options
    assert (worker.concurrency, worker.is_declared) == (4, False)


def test_bounds_that_were_asked_for_win(app: gw.App) -> None:
    worker = fitted(plan_of(app, *bounded(app, (1, 3))), WorkerOptions(), autoscale=(2, 2))
    assert worker.options["autoscale"] == (4, 4)
    assert not worker.is_declared


@pytest.mark.parametrize("broker", ["memory://", "filesystem://"])
def test_zero_replicas_are_refused_where_the_worker_learns_of_no_message(
    app: gw.App, broker: str
) -> None:
    queues = bounded(app, (0, 3))
    with pytest.raises(errors.ConfigurationError, match="does not tell: let one stay"):
        fitted(plan_of(app, *queues), WorkerOptions(), broker=broker)
    assert fitted(plan_of(app, *queues), WorkerOptions(), broker="amqp://").options[
        "autoscale"
    ] == (6, 0)
    kept = fitted(plan_of(app, *queues), WorkerOptions(), broker=broker, autoscale=(3, 1))
    assert kept.options["autoscale"] == (6, 2)


# -- gw worker: queues --


@pytest.mark.parametrize(
    ("asked", "families"),
    [
        (WorkerOptions(gpu="A100"), ["gpu.A100"]),
        (WorkerOptions(gpu="CPU"), ["cpu"]),
        (WorkerOptions(), ["gpu", "gpu.A100", "gpu.L4"]),
        (WorkerOptions(names_queues=True), ["celery"]),
    ],
)
def test_a_worker_consumes_the_families_that_it_takes(
    declared: gw.App, asked: WorkerOptions, families: list[str]
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
    sizing.select_families(worker, WorkerOptions(gpu="CPU"), [declared.registry], conf.Settings())
    assert list(declared.celery.amqp.queues.consume_from) == ["cpu"]
