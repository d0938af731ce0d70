from __future__ import annotations

import pickle
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.app.utils import find_app

from gw_celery import errors
from gw_celery.pool import origin

Module = Callable[..., types.ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Makes a module that is imported until the test ends."""

    def make(name: str, **namespace: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(namespace)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return make


@pytest.fixture
def proj() -> Celery:
    return Celery("proj", set_as_current=False, broker="memory://")


def test_an_app_is_found_where_it_is_a_global(proj: Celery, module: Module) -> None:
    module("proj.celery", app=proj)
    assert origin.find(proj) == "proj.celery:app"


def test_what_is_found_is_what_celery_takes_on_its_command_line(
    proj: Celery, module: Module
) -> None:
    module("elsewhere", queue_app=proj)
    assert find_app(origin.find(proj)) is proj


def test_the_module_that_made_the_app_is_preferred_to_those_that_import_it(
    proj: Celery, module: Module
) -> None:
    module("a", app=proj)
    module("proj", celery_app=proj)
    module("proj.celery", app=proj)
    module("proj.views", app=proj)
    module("proj.tasks", queue=proj)
    assert origin.find(proj) in {"proj.celery:app", "proj:celery_app"}


def test_an_unusual_name_will_do(proj: Celery, module: Module) -> None:
    module("weird.place", _hidden=proj)
    assert origin.find(proj) == "weird.place:_hidden"


def test_of_two_apps_each_is_found_as_itself(proj: Celery, module: Module) -> None:
    other = Celery("proj", set_as_current=False)
    module("proj.celery", app=proj, other=other)
    assert origin.find(proj) == "proj.celery:app"
    assert origin.find(other) == "proj.celery:other"


@pytest.mark.parametrize("name", ["celery.somewhere", "kombu.x", "gw_celery.app", "_pytest.x"])
def test_where_an_app_only_passes_through_it_is_not_found(
    proj: Celery, module: Module, name: str
) -> None:
    module(name, app=proj)
    with pytest.raises(errors.ConfigurationError):
        origin.find(proj)


def test_a_module_that_runs_as_a_program_is_found_under_its_own_name(
    proj: Celery, module: Module
) -> None:
    program = module("__main__", app=proj)
    program.__spec__ = types.SimpleNamespace(name="proj.celery")  # type: ignore[assignment]
    assert origin.find(proj) == "proj.celery:app"


def test_an_app_that_only_a_script_has_cannot_be_imported(proj: Celery, module: Module) -> None:
    module("__main__", app=proj)
    with pytest.raises(errors.ConfigurationError, match="celery -A proj worker"):
        origin.find(proj)


def test_an_app_of_no_module_is_refused_by_its_name() -> None:
    with pytest.raises(errors.ConfigurationError, match="'nowhere'"):
        origin.find(Celery("nowhere", set_as_current=False))


def test_modules_that_are_none_are_passed_over(
    proj: Celery, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "blocked", None)  # type: ignore[arg-type]
    module("proj.celery", app=proj)
    assert origin.find(proj) == "proj.celery:app"


def changes(app: Celery) -> dict[str, Any]:
    return pickle.loads(origin.changes(app))


def test_settings_that_were_changed_here_travel(proj: Celery) -> None:
    assert proj.conf.task_always_eager is False
    proj.conf.task_default_queue = "changed"
    assert changes(proj)["task_default_queue"] == "changed"


def test_settings_that_were_changed_before_the_first_look_travel() -> None:
    app = Celery("fresh", set_as_current=False)
    app.conf.update(task_default_queue="early")
    assert changes(app)["task_default_queue"] == "early"


@pytest.mark.parametrize("value", [lambda: None, threading.Lock()], ids=["function", "lock"])
def test_settings_that_cannot_travel_stay_and_the_others_go(proj: Celery, value: Any) -> None:
    proj.conf.beat_schedule_filename = value
    proj.conf.task_default_queue = "changed"
    assert "beat_schedule_filename" not in changes(proj)
    assert changes(proj)["task_default_queue"] == "changed"
