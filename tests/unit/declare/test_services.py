from __future__ import annotations

import functools

import pytest

import gw_celery as gw
from gw_celery.declare import services
from tests.unit.refusals import NOT_FINITE, NOT_NUMBERS, refused

DECORATORS = pytest.mark.parametrize("decorate", ["remote", "cls"])
NEITHER = tuple(value for value in NOT_NUMBERS if value is not None)


async def square(x):
    return x * x


def plain(x):
    return x


class Model:
    @gw.method()
    def predict(self, x): ...


def only(app: gw.App) -> services.Service:
    (service,) = app.registry.services.values()
    return service


def test_a_remote_function_is_a_service_with_one_task(app: gw.App) -> None:
    task = app.remote(square)
    service = only(app)

    assert task.name == f"{__name__}.square"
    assert list(service.methods) == ["square"]
    assert not service.is_class
    assert service.queue == "gpu.square"


def test_async_missing_on_a_remote_function_is_refused(app: gw.App) -> None:
    error = refused(app.remote, plain)

    assert (error.argument, error.value) == ("fn", "plain")
    assert "write `async def`" in error.rule


@pytest.mark.parametrize("target", [Model, functools.partial(square), print, 3])
def test_a_remote_function_that_is_no_function_is_refused(app: gw.App, target: object) -> None:
    error = refused(app.remote, target)

    assert error.argument == "fn"
    assert error.value is target
    assert "decorates a function" in error.rule


@pytest.mark.parametrize("target", [square, 3, Model()])
def test_cls_on_what_is_no_class_is_refused(app: gw.App, target: object) -> None:
    error = refused(app.cls(), target)

    assert error.argument == "class"
    assert error.value is target
    assert "decorates a class" in error.rule


@DECORATORS
def test_an_unknown_gpu_kind_is_refused_at_decoration(app: gw.App, decorate: str) -> None:
    error = refused(getattr(app, decorate), gpu=gw.Gpu("A1000"))

    assert (error.argument, error.value) == ("gpu", "A1000")
    assert "unknown GPU kind" in error.rule


def test_a_kind_that_the_setting_adds_is_taken(app: gw.App) -> None:
    app.celery.conf.gw_gpu_kinds = ["B200"]
    app.remote(gpu=gw.Gpu("B200"))(square)

    assert only(app).queue == "gpu.B200.square"


@DECORATORS
@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        (argument, value, rule)
        for argument, values, rule in (
            ("min_workers", [-1, 1.0, *NOT_FINITE, *NOT_NUMBERS], "0 or more"),
            ("max_workers", [0, -1, 2.0, *NOT_FINITE, *NEITHER], "1 or more"),
            ("timeout", [0, -1, *NOT_FINITE, *NEITHER], "over 0"),
            ("max_queue_time", [0, -1, *NOT_FINITE, *NEITHER], "over 0"),
            ("queue", ["", " ", "a,b", " vip", "vip\n", 3, ["gpu"], b"gpu"], "name of a queue"),
        )
        for value in values
    ],
)
def test_an_argument_that_breaks_its_rule_is_refused(
    app: gw.App, decorate: str, argument: str, value: object, rule: str
) -> None:
    error = refused(getattr(app, decorate), **{argument: value})

    assert error.argument == argument
    assert error.value is value
    assert rule in error.rule


@DECORATORS
def test_workers_out_of_order_are_refused(app: gw.App, decorate: str) -> None:
    error = refused(getattr(app, decorate), min_workers=3, max_workers=2)

    assert (error.argument, error.value) == ("max_workers", 2)
    assert "min_workers=3" in error.rule


def test_a_queue_of_the_users_leaves_the_family(app: gw.App) -> None:
    app.cls(gpu=gw.Gpu("A100"), queue="vip")(type("Own", (Model,), {}))

    assert (only(app).queue, only(app).family) == ("vip", "gpu.A100")


def test_a_class_without_methods_is_refused(app: gw.App) -> None:
    class Empty:
        def predict(self): ...

    error = refused(app.cls, Empty)

    assert error.argument == "class"
    assert "Empty" in error.value
    assert "no method marked with @gw.method()" in error.rule


def test_a_class_that_is_made_with_arguments_is_refused(app: gw.App) -> None:
    class Model:
        def __init__(self, path): ...

        @gw.method()
        def predict(self): ...

    error = refused(app.cls, Model)

    assert error.argument == "class"
    assert "gw.parameter()" in error.rule
    assert "'path'" in error.rule


def test_a_class_that_is_made_with_defaults_is_taken(app: gw.App) -> None:
    class Model:
        def __init__(self, path="/models"): ...

        @gw.method()
        def predict(self): ...

    assert app.cls(Model) is Model


def test_a_class_whose_state_cannot_be_shared_is_refused(app: gw.App) -> None:
    class Model:
        __slots__ = ("model",)

        @gw.method()
        def predict(self): ...

    error = refused(app.cls, Model)

    assert error.argument == "class"
    assert "__slots__" in error.rule


def test_a_method_without_self_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method()
        def predict(): ...

    assert "`self`" in refused(app.cls, Model).rule


def test_a_bound_method_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method(bind=True)
        def predict(self, task, x): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("bind", True)
    assert "current_task" in error.rule


def test_a_bound_batched_function_is_refused(app: gw.App) -> None:
    async def embed(self, texts): ...

    error = refused(app.remote(bind=True), gw.batched(max_batch_size=2)(embed))

    assert (error.argument, error.value) == ("bind", True)
    assert "many requests: leave it out" in error.rule


def test_models_of_a_batched_method_are_refused(app: gw.App) -> None:
    class Model:
        @gw.method(pydantic=True)
        @gw.batched(max_batch_size=2)
        def embed(self, texts): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("pydantic", True)
    assert "build the models in the body" in error.rule


def test_a_name_of_the_users_is_the_name_of_the_task(app: gw.App) -> None:
    assert app.remote(name="search.square")(square).name == "search.square"


def test_celery_options_reach_the_task(app: gw.App) -> None:
    task = app.remote(timeout=20, rate_limit="3/s", max_retries=7)(square)

    assert (task.time_limit, task.rate_limit, task.max_retries) == (20.0, "3/s", 7)


def test_a_task_is_acknowledged_late_unless_told(app: gw.App) -> None:
    async def other(x): ...

    kept = app.remote(square)
    lost = app.remote(acks_late=False, reject_on_worker_lost=False)(other)

    assert (kept.acks_late, kept.reject_on_worker_lost) == (True, True)
    assert (lost.acks_late, lost.reject_on_worker_lost) == (False, False)


def test_a_method_is_called_without_self(app: gw.App) -> None:
    app.cls(type("Own", (Model,), {}))

    assert list(only(app).methods["predict"].signature.parameters) == ["x"]


def test_declarations_can_be_looked_at(app: gw.App) -> None:
    @app.cls(
        gpu=gw.Gpu("A100", 2, memory_gb=20),
        min_workers=1,
        max_workers=4,
        max_queue_time=30,
        probes=[gw.Probe.on("health")],
    )
    @gw.concurrent(max_inputs=8, target_inputs=6)
    class Declared:
        threshold: float = gw.parameter(default=0.5)

        @gw.method(
            benchmark_dataset=[{"x": 1}],
            benchmark_runs=3,
            benchmark_concurrency=2,
            workload_calculator=lambda x: x,
        )
        @gw.batched(max_batch_size=4, wait_ms=20)
        def predict(self, x): ...

        @gw.method()
        def health(self): ...

    service = only(app)
    method = service.methods["predict"]

    assert service.placement == services.Placement(
        gpu=gw.Gpu("A100", 2, memory_gb=20), min_workers=1, max_workers=4, max_queue_time=30.0
    )
    assert service.family == "gpu.A100x2"
    assert service.concurrent is not None
    assert service.concurrent.target_inputs == 6
    assert service.probes == (gw.Probe.on("health"),)
    assert service.parameters["threshold"].default == 0.5
    assert method.batched is not None
    assert (method.batched.max_batch_size, method.batched.wait_ms) == (4, 20)
    assert method.benchmark is not None
    assert (method.benchmark.runs, method.benchmark.concurrency) == (3, 2)
    assert method.workload_calculator is not None
