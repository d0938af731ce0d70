from __future__ import annotations

import pytest

import gw_celery as gw
from gw_celery.declare import registry
from tests.unit.refusals import refused


class Weights:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc): ...


class Connection:
    def __enter__(self):
        return self

    def __exit__(self, *exc): ...


def declare(app: gw.App, function: str, **given):
    async def body(): ...

    body.__name__ = body.__qualname__ = function
    return app.remote(**given)(body)


def test_a_context_comes_back_unchanged_and_is_not_made(app: gw.App) -> None:
    class Loud(Weights):
        def __init__(self, *args, **kwargs):
            raise AssertionError("made at import")

    assert app.context("Qwen/Qwen3-0.6B", max_len=512)(Loud) is Loud
    (context,) = app.registry.contexts.values()
    assert (context.args, context.kwargs) == (("Qwen/Qwen3-0.6B",), {"max_len": 512})


def test_both_kinds_of_context_managers_are_contexts(app: gw.App) -> None:
    app.context()(Weights)
    app.context()(Connection)

    assert list(app.registry.contexts) == [f"{__name__}.Weights", f"{__name__}.Connection"]


@pytest.mark.parametrize("target", [int, 3, Weights(), None, type("Half", (), {"__aenter__": 1})])
def test_what_is_no_context_is_refused(app: gw.App, target: object) -> None:
    error = refused(app.context(), target)

    assert error.argument == "context"
    assert error.value is target
    assert "__aenter__ and __aexit__" in error.rule


def test_the_same_context_twice_is_refused(app: gw.App) -> None:
    app.context()(Weights)
    error = refused(app.context("other"), Weights)

    assert (error.argument, error.value) == ("context", f"{__name__}.Weights")
    assert "registered already in App('unit')" in error.rule


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [((1, 2), {}, "too many"), ((), {}, "'size'"), ((1,), {"sise": 2}, "'sise'")],
)
def test_arguments_that_a_context_does_not_take_are_refused(app, args, kwargs, why) -> None:
    class Sized(Weights):
        def __init__(self, size): ...

    error = refused(app.context(*args, **kwargs), Sized)

    assert error.argument == "context"
    assert error.value.endswith("Sized")
    assert why in error.rule
    assert app.registry.contexts == {}


def test_a_context_without_parentheses_says_what_to_write(app: gw.App) -> None:
    error = refused(app.context, Weights)

    assert (error.argument, error.value) == ("context", Weights)
    assert "write @app.context()" in error.rule


def test_a_class_reaches_a_context_by_its_name(app: gw.App) -> None:
    class Loaded(Weights):
        def __init__(self, model_class): ...

    assert app.context(model_class=int)(Loaded) is Loaded


def test_the_same_function_twice_is_refused(app: gw.App) -> None:
    declare(app, "square")
    error = refused(declare, app, "square")

    assert (error.argument, error.value) == ("service", f"{__name__}.square")
    assert "declared twice" in error.rule


def test_the_same_class_twice_is_refused(app: gw.App) -> None:
    @app.cls
    class Model:
        @gw.method()
        def predict(self): ...

    error = refused(app.cls, Model)

    assert error.argument == "class"
    assert error.value.endswith("Model")
    assert "decorated twice" in error.rule


def test_the_same_task_name_twice_is_refused(app: gw.App) -> None:
    declare(app, "first", name="search.rank")
    error = refused(declare, app, "second", name="search.rank")

    assert (error.argument, error.value) == ("name", "search.rank")
    assert f"a task of {__name__}.first in App('unit') already" in error.rule


def test_the_same_task_name_twice_in_one_class_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method(name="search.rank")
        def first(self): ...

        @gw.method(name="search.rank")
        def second(self): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("name", "search.rank")
    assert "Model.first too" in error.rule


def test_two_services_that_would_share_a_queue_by_accident_are_refused(app: gw.App) -> None:
    declare(app, "rank")
    error = refused(declare, app, "other", queue="gpu.rank")

    assert (error.argument, error.value) == ("queue", "gpu.rank")
    assert "rename one" in error.rule


@pytest.mark.parametrize("queue", ["cpu", "gpu", "gpu.A100", "gpu.H200", "gpu.A100_80x8"])
def test_a_queue_that_is_named_as_a_family_is_refused(app: gw.App, queue: str) -> None:
    error = refused(declare, app, "rank", gpu=gw.Gpu("T4"), queue=queue)

    assert (error.argument, error.value) == ("queue", queue)
    assert f"`-Q {queue}` means every service of it, and would reach rank alone" in error.rule
    assert app.registry.services == {}


def test_a_service_whose_own_name_makes_its_queue_a_family_is_refused(app: gw.App) -> None:
    error = refused(declare, app, "T4")

    assert (error.argument, error.value) == ("queue", "gpu.T4")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_queue_that_is_the_family_of_an_added_kind_is_refused(celery_app, is_first) -> None:
    celery_app.conf.gw_gpu_kinds = ("B200",)
    one, another = gw.App("one", celery_app), gw.App("another", celery_app)
    on_family = {"gpu": gw.Gpu("B200")}, {"queue": "gpu.B200"}
    first, second = on_family if is_first else on_family[::-1]
    declare(one, "first", **first)
    error = refused(declare, another, "second", **second)

    assert (error.argument, error.value) == ("queue", "gpu.B200")


@pytest.mark.parametrize("queue", ["gpu.A100.rank", "gpu.rank", "gpu.A100x9", "gpus", "cpu.x"])
def test_a_queue_that_is_named_nearly_as_a_family_is_fine(app: gw.App, queue: str) -> None:
    declare(app, "rank", gpu=gw.Gpu("A100"), queue=queue)

    assert registry.families([app.registry]) == {"gpu.A100": [queue]}


def test_two_services_share_a_queue_on_purpose(app: gw.App) -> None:
    declare(app, "first", queue="shared")
    declare(app, "second", queue="shared")

    assert registry.families([app.registry]) == {"gpu": ["shared"]}


def test_what_was_refused_is_not_declared(app: gw.App) -> None:
    declare(app, "first", name="search.rank")
    refused(declare, app, "second", name="search.rank")

    assert list(app.registry.services) == [f"{__name__}.first"]


def test_a_family_lists_the_queues_of_its_services(app: gw.App) -> None:
    declare(app, "first", gpu=gw.Gpu("A100"))
    declare(app, "second", gpu=gw.Gpu("A100"))
    declare(app, "third")

    assert registry.families([app.registry]) == {
        "gpu.A100": ["gpu.A100.first", "gpu.A100.second"],
        "gpu": ["gpu.third"],
    }


def test_a_service_is_served_where_its_queue_is_consumed(app: gw.App) -> None:
    declare(app, "first")
    declare(app, "second")
    served = registry.serving([app.registry], ["gpu.second", "celery"])

    assert [one.name for one in served] == ["second"]
