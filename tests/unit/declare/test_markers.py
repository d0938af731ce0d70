from __future__ import annotations

import pytest

import gw_celery as gw
from gw_celery.declare import markers, services
from tests.unit.refusals import NOT_FINITE, NOT_NUMBERS, refused

NOT_COUNTS = (1.5, *NOT_FINITE, *NOT_NUMBERS)
NEITHER = tuple(value for value in NOT_COUNTS if value is not None)
SIZED = {"max_batch_size": 4}
COSTED = {**SIZED, "size_fn": len}


def service_of(cls: type) -> services.Service:
    return services.from_class(cls, services.Placement(), ())


def test_hooks_are_marked_with_and_without_parentheses() -> None:
    class Model:
        @gw.on_enter
        def load(self): ...

        @gw.on_enter()
        def warm_up(self): ...

        @gw.on_exit
        def unload(self): ...

        @gw.on_exit()
        def close(self): ...

        @gw.method
        def predict(self): ...

    service = service_of(Model)

    assert service.enter_hooks == ("load", "warm_up")
    assert service.exit_hooks == ("close", "unload")
    assert list(service.methods) == ["predict"]


def test_a_marker_leaves_the_function_as_it_was() -> None:
    def predict(self, x):
        return x

    assert gw.method()(predict) is predict
    assert gw.on_enter()(predict) is predict
    assert gw.batched(max_batch_size=2)(predict) is predict


@pytest.mark.parametrize("mark", [gw.on_enter, gw.on_exit, gw.method])
@pytest.mark.parametrize("target", [int, 3, "load", print, staticmethod(len), property(len)])
def test_a_marker_on_what_is_no_method_is_refused(mark, target) -> None:
    error = refused(mark(), target)

    assert error.argument == f"gw.{mark.__name__}"
    assert error.value is target
    assert "marks a method of a class" in error.rule


@pytest.mark.parametrize(
    ("decorator", "misspelt", "meant"),
    [
        (gw.concurrent, "max_input", "max_inputs"),
        (gw.concurrent, "target", "target_inputs"),
        (gw.batched, "max_batchsize", "max_batch_size"),
        (gw.batched, "Wait_ms", "wait_ms"),
        (gw.method, "autoretry_fr", "autoretry_for"),
        (gw.Probe.on, "perod_s", "period_s"),
        (gw.parameter, "defalt", "default"),
        (gw.Gpu, "cont", "count"),
        (gw.Gpu, "memory", "memory_gb"),
    ],
)
def test_a_misspelt_keyword_is_refused_with_the_one_that_was_meant(
    decorator, misspelt: str, meant: str
) -> None:
    error = refused(decorator, **{misspelt: 3})

    assert (error.argument, error.value) == (misspelt, 3)
    assert error.rule == f"unknown argument; did you mean {meant}=?"


@pytest.mark.parametrize(
    ("decorator", "known"),
    [
        (gw.concurrent, "gw.concurrent takes max_inputs, target_inputs"),
        (gw.parameter, "gw.parameter takes default, scope"),
        (gw.Gpu, "gw.Gpu takes kind, count, memory_gb"),
        (gw.Probe.on, "gw.Probe.on takes method, kind, period_s, timeout_s, failures"),
        (gw.on_enter, "gw.on_enter takes none"),
        (gw.on_exit, "gw.on_exit takes none"),
    ],
)
def test_a_keyword_like_no_other_is_refused_with_all_of_them(decorator, known: str) -> None:
    error = refused(decorator, zzz=3)

    assert error.rule == f"unknown argument; {known}"


def test_a_keyword_is_judged_before_one_that_is_missing() -> None:
    assert refused(gw.batched, wait=5).argument == "wait"
    with pytest.raises(TypeError, match="max_inputs"):
        gw.concurrent()


@pytest.mark.parametrize(
    ("decorator", "others", "argument", "value", "rule"),
    [
        (decorator, others, argument, value, rule)
        for decorator, others, argument, values, rule in (
            (gw.concurrent, {}, "max_inputs", [0, -1, *NOT_COUNTS], "1 or more"),
            (gw.concurrent, {"max_inputs": 8}, "target_inputs", [0, -1, 9, *NEITHER], "1 to 8"),
            (gw.batched, {}, "max_batch_size", [0, 1001, -1, *NOT_COUNTS], "1 to 1000"),
            (gw.batched, SIZED, "wait_ms", [-1, 600_001, *NOT_COUNTS], "0 to 600000"),
            (gw.batched, SIZED, "max_running_batches", [0, -1, *NOT_COUNTS], "1 or more"),
            (gw.batched, COSTED, "max_batch_cost", [0, -1, *NEITHER], "1 or more"),
        )
        for value in values
    ],
)
def test_a_number_out_of_range_is_refused(
    decorator, others: dict[str, object], argument: str, value: object, rule: str
) -> None:
    error = refused(decorator, **others, **{argument: value})

    assert error.argument == argument
    assert error.value is value
    assert rule in error.rule


def test_the_scaler_aims_at_max_inputs_unless_told() -> None:
    class Plain:
        @gw.method()
        def run(self): ...

    marked = gw.concurrent(max_inputs=16)(Plain)

    assert marked is Plain
    assert service_of(Plain).concurrent == markers.Concurrent(max_inputs=16, target_inputs=16)


def test_concurrent_above_cls_is_refused(app: gw.App) -> None:
    @app.cls
    class Model:
        @gw.method()
        def predict(self): ...

    error = refused(gw.concurrent(max_inputs=2), Model)

    assert (error.argument, error.value) == ("gw.concurrent", Model)
    assert "below @app.cls" in error.rule


def test_a_marker_above_remote_is_refused(app: gw.App) -> None:
    @app.remote
    async def square(x): ...

    for mark in (gw.concurrent(max_inputs=2), gw.batched(max_batch_size=2)):
        error = refused(mark, square)
        assert error.value is square
        assert "below @app.cls or @app.remote" in error.rule


def test_concurrent_on_a_method_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method()
        @gw.concurrent(max_inputs=4)
        def predict(self): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("gw.concurrent", "predict")
    assert "class" in error.rule


def test_batched_on_what_is_no_method_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method()
        def predict(self): ...

        @gw.batched(max_batch_size=4)
        def embed(self, texts): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("gw.batched", "embed")
    assert "@gw.method()" in error.rule


@pytest.mark.parametrize("given", [{"size_fn": len}, {"max_batch_cost": 100}])
def test_a_cost_without_its_limit_is_refused(given: dict[str, object]) -> None:
    error = refused(gw.batched, max_batch_size=4, **given)

    assert (error.argument, error.value) == ("max_batch_cost", given.get("max_batch_cost"))
    assert "go together" in error.rule


def test_a_way_of_failing_that_does_not_exist_is_refused() -> None:
    error = refused(gw.batched, max_batch_size=4, on_error="ignore")

    assert (error.argument, error.value) == ("on_error", "ignore")
    assert '"isolate" or "fail"' in error.rule


@pytest.mark.parametrize("argument", ["key", "size_fn"])
def test_a_key_that_cannot_be_called_is_refused(argument: str) -> None:
    given = {argument: "language", **({"max_batch_cost": 1} if argument == "size_fn" else {})}
    error = refused(gw.batched, max_batch_size=4, **given)

    assert (error.argument, error.value) == (argument, "language")
    assert "must be a function" in error.rule


def test_a_batched_function_with_variadic_parameters_is_refused() -> None:
    def many(self, *texts): ...
    def named(self, **options): ...

    for fn, parameter in ((many, "*texts"), (named, "**options")):
        error = refused(gw.batched(max_batch_size=4), fn)
        assert (error.argument, error.value) == ("gw.batched", parameter)
        assert "named parameters only" in error.rule


def test_a_batched_service_takes_twice_its_batch_unless_told(app: gw.App) -> None:
    class Embedder:
        @gw.method()
        @gw.batched(max_batch_size=64)
        def embed(self, texts): ...

    assert service_of(Embedder).max_inputs == 128


def test_a_service_takes_one_input_unless_told() -> None:
    class Model:
        @gw.method()
        def predict(self): ...

    assert service_of(Model).max_inputs == 1


def test_batches_that_could_never_fill_are_refused(app: gw.App) -> None:
    @gw.concurrent(max_inputs=63)
    class Embedder:
        @gw.method()
        @gw.batched(max_batch_size=32, max_running_batches=2)
        def embed(self, texts): ...

    error = refused(app.cls, Embedder)

    assert (error.argument, error.value) == ("max_inputs", 63)
    assert "= 64 for Embedder.embed" in error.rule


def test_markers_of_a_child_never_leak_to_its_parent() -> None:
    class Parent:
        @gw.method()
        def embed(self, texts): ...

    @gw.concurrent(max_inputs=4)
    class Child(Parent):
        @gw.on_enter()
        def load(self): ...

        @gw.method()
        def rank(self, texts): ...

        @gw.method()
        @gw.batched(max_batch_size=2)
        def embed(self, texts): ...

    child, parent = service_of(Child), service_of(Parent)

    assert list(child.methods) == ["embed", "rank"]
    assert child.max_inputs == 4
    assert child.methods["embed"].batched is not None
    assert list(parent.methods) == ["embed"]
    assert parent.enter_hooks == ()
    assert parent.concurrent is None
    assert parent.methods["embed"].batched is None


def test_hooks_run_base_classes_first_and_are_left_in_reverse() -> None:
    class Base:
        @gw.on_enter()
        def connect(self): ...

        @gw.on_exit()
        def disconnect(self): ...

    class Left(Base):
        @gw.on_enter()
        def load(self): ...

        @gw.on_exit()
        def unload(self): ...

    class Right(Base):
        @gw.on_enter()
        def warm_up(self): ...

    class Model(Left, Right):
        @gw.on_enter()
        def connect(self): ...

        @gw.on_exit()
        def report(self): ...

        @gw.method()
        def predict(self): ...

    service = service_of(Model)

    assert service.enter_hooks == ("connect", "warm_up", "load")
    assert service.exit_hooks == ("report", "unload", "disconnect")


def test_an_override_without_the_marker_is_an_ordinary_method() -> None:
    class Parent:
        @gw.on_enter()
        def load(self): ...

        @gw.method()
        def embed(self): ...

        @gw.method()
        def rank(self): ...

    class Child(Parent):
        def load(self): ...

        def embed(self): ...

    service = service_of(Child)

    assert list(service.methods) == ["rank"]
    assert service.enter_hooks == ()


def test_a_decorated_child_of_a_decorated_parent_has_tasks_of_its_own(app: gw.App) -> None:
    @app.cls(gpu=gw.Gpu("A100"))
    class Parent:
        @gw.method()
        def embed(self, texts): ...

    @app.cls(gpu=gw.Gpu("H100"))
    class Child(Parent):
        @gw.method()
        def rank(self, texts): ...

    parent, child = app.registry.services.values()

    assert [method.task_name for method in child.methods.values()] == [
        f"{__name__}.Child.embed",
        f"{__name__}.Child.rank",
    ]
    assert [method.task_name for method in parent.methods.values()] == [f"{__name__}.Parent.embed"]
    assert (parent.queue, child.queue) == ("gpu.A100.Parent", "gpu.H100.Child")
    assert child.methods["embed"].function is parent.methods["embed"].function
