"""What the keywords of the decorators may be, and what a misspelt one says."""

from __future__ import annotations

import inspect

import celery
import pytest
from celery import Celery

import gw_celery as gw
from gw_celery import codec, errors
from gw_celery.declare import check
from tests.unit.refusals import NOT_FINITE, refused

#: Attributes of a Task that are no options.
INNER = {
    "abstract", "add_around", "annotate", "app", "bind", "from_config", "on_bound", "request",
    "request_stack",
}  # fmt: skip


async def square(x):
    return x * x


def declare(app: gw.App, kind: str, /, **given):
    """Declare one task with ``given`` options, as a function or as a method."""
    if kind == "remote":
        return app.remote(**given)(square)

    class Model:
        @gw.method(**given)
        def predict(self, x): ...

    app.cls(Model)
    return app.celery.tasks[f"{__name__}.Model.predict"]


TASKS = pytest.mark.parametrize("kind", ["remote", "method"])


def test_every_option_of_celerys_tasks_is_known() -> None:
    # Statically: asking the class for its app would bind it to one.
    attributes = {
        name
        for name in dir(celery.Task)
        if not name.startswith("_") and not callable(inspect.getattr_static(celery.Task, name))
    }
    keywords = inspect.signature(Celery._task_from_fun).parameters.keys() - {"self", "fun"}

    assert attributes - INNER - set(check.OF_CELERY) == set()
    assert keywords - {"options"} - set(check.OF_CELERY) == set()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("gpus", "gpu"),
        ("max_worker", "max_workers"),
        ("Timeout", "timeout"),
        ("benchmark_datset", "benchmark_dataset"),
        ("auto_retry_for", "autoretry_for"),
        ("soft_limit", "soft_time_limit"),
        ("ratelimit", "rate_limit"),
    ],
)
@pytest.mark.parametrize("kind", ["remote", "method", "cls"])
def test_a_misspelt_argument_is_refused_with_the_nearest(app, kind: str, name, nearest) -> None:
    decorate = gw.method if kind == "method" else getattr(app, kind)
    error = refused(decorate, **{name: 3})

    assert (error.argument, error.value) == (name, 3)
    assert f"did you mean {nearest}=?" in error.rule


@TASKS
def test_an_attribute_of_the_users_own_reaches_the_task(app: gw.App, kind: str) -> None:
    task = declare(app, kind, my_option=3, tenant="a")

    assert (task.my_option, task.tenant) == (3, "a")


@TASKS
@pytest.mark.parametrize("name", ["retry", "delay", "run", "app", "gw_service", "spawn"])
def test_an_attribute_that_every_task_has_is_refused(app: gw.App, kind: str, name: str) -> None:
    error = refused(declare, app, kind, **{name: 3})

    assert (error.argument, error.value) == (name, 3)
    assert "part of every task" in error.rule
    assert app.registry.services == {}


@pytest.mark.parametrize("name", [*check.OF_A_SERVICE, "probes"])
def test_what_concerns_the_class_is_refused_on_a_method(name: str) -> None:
    error = refused(gw.method, **{name: 3})

    assert (error.argument, error.value) == (name, 3)
    assert "give it to @app.cls" in error.rule


def test_probes_are_refused_on_a_function(app: gw.App) -> None:
    assert "@app.cls takes it" in refused(app.remote, probes=[]).rule


@pytest.mark.parametrize("name", ["benchmark_runs", "autoretry_for", "bind", "serializer"])
def test_what_concerns_one_task_is_refused_on_a_class(app: gw.App, name: str) -> None:
    error = refused(app.cls, **{name: 3})

    assert (error.argument, error.value) == (name, 3)
    assert "give it to @gw.method()" in error.rule


def test_a_class_has_no_attributes_of_the_users_own(app: gw.App) -> None:
    error = refused(app.cls, my_option=3)

    assert (error.argument, error.value) == ("my_option", 3)
    assert "no argument of @app.cls; it takes: gpu, queue" in error.rule


@TASKS
@pytest.mark.parametrize("name", ["time_limit", "soft_time_limit"])
@pytest.mark.parametrize("value", [0, -1, "10", True, [1], 10**400, *NOT_FINITE])
def test_a_limit_that_is_no_time_is_refused(app, kind: str, name: str, value: object) -> None:
    error = refused(declare, app, kind, **{name: value})

    assert error.argument == name
    assert error.value is value
    assert "over 0" in error.rule


@TASKS
@pytest.mark.parametrize(
    ("given", "over"),
    [({"soft_time_limit": 301}, "timeout=300"), ({"soft_time_limit": 9, "time_limit": 8}, "=8")],
)
def test_a_soft_limit_over_the_hard_one_is_refused(app, kind: str, given, over: str) -> None:
    error = refused(declare, app, kind, **given)

    assert (error.argument, error.value) == ("soft_time_limit", given["soft_time_limit"])
    assert over in error.rule


@TASKS
@pytest.mark.parametrize(
    "given",
    [
        {"soft_time_limit": 300},
        {"soft_time_limit": 1000, "time_limit": 2000},
        {"soft_time_limit": 1000, "time_limit": None},
    ],
)
def test_a_soft_limit_up_to_the_hard_one_is_taken(app, kind: str, given) -> None:
    assert declare(app, kind, **given).soft_time_limit == given["soft_time_limit"]


@TASKS
@pytest.mark.parametrize("value", ["pickle", "yaml", "msgpack", None, 3])
def test_a_serializer_that_no_worker_reads_is_refused(app, kind: str, value: object) -> None:
    error = refused(declare, app, kind, serializer=value)

    assert (error.argument, error.value) == ("serializer", value)
    assert "gw-json or json; gw.register_type" in error.rule


@pytest.mark.parametrize("value", [codec.NAME, "json"])
def test_a_serializer_that_workers_read_is_taken(app: gw.App, value: str) -> None:
    assert app.remote(serializer=value)(square).serializer == value


@TASKS
@pytest.mark.parametrize("option", ["throws", "autoretry_for", "dont_autoretry_for"])
def test_one_class_of_exceptions_needs_no_tuple(app: gw.App, kind: str, option: str) -> None:
    ours = (errors.QueueTimeExceeded,) if option == "throws" else ()
    assert getattr(declare(app, kind, **{option: ValueError}), option) == (ValueError, *ours)


@TASKS
@pytest.mark.parametrize("option", ["throws", "autoretry_for", "dont_autoretry_for"])
@pytest.mark.parametrize(
    "value", ["ValueError", 3, None, int, (int,), ("ValueError",), [OSError()]]
)
def test_what_is_no_exception_is_refused(app, kind: str, option: str, value: object) -> None:
    error = refused(declare, app, kind, **{option: value})

    assert error.argument == option
    assert error.value is value
    assert "tuple of exception classes" in error.rule


@TASKS
@pytest.mark.parametrize("value", ["", " ", 3])
def test_a_name_that_is_none_is_refused(app: gw.App, kind: str, value: object) -> None:
    error = refused(declare, app, kind, name=value)

    assert (error.argument, error.value) == ("name", value)
    assert "name of a task" in error.rule


@TASKS
@pytest.mark.parametrize("name", ["exchange", "routing_key"])
def test_a_route_past_the_queue_is_refused(app: gw.App, kind: str, name: str) -> None:
    error = refused(declare, app, kind, **{name: "x"})

    assert (error.argument, error.value) == (name, "x")
    assert "which queue= names" in error.rule
