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
    assert f"a task of {__name__}.first already" in error.rule


def test_the_same_task_name_twice_in_one_class_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method(name="search.rank")
        def first(self): ...

        @gw.method(name="search.rank")
        def second(self): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("name", "search.rank")
    assert "already" in error.rule


def test_two_services_that_would_share_a_queue_by_accident_are_refused(app: gw.App) -> None:
    declare(app, "rank")
    error = refused(declare, app, "other", queue="gpu.rank")

    assert (error.argument, error.value) == ("queue", "gpu.rank")
    assert "rename one" in error.rule


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
