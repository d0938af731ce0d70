"""A plain Celery task and one of ours have different names: Celery would keep only one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, _state, shared_task

import gw_celery as gw
from tests.unit.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore:.*is already registered")  # Celery 5.7

PLAIN = f"{__name__}.plain"
NAME = "search.rank"


def plain(x): ...


async def ours(x): ...


class Model:
    """A class task anew for each test, for ``app.cls`` changes it."""

    def __new__(cls) -> Any:
        @gw.method(name=NAME)
        def rank(self, x): ...

        return type("Model", (), {"rank": rank})


@pytest.fixture
def lazy(celery_app: Celery) -> Iterator[gw.App]:
    """A lazy App, with ``celery_app`` in use."""
    before = _state._tls.current_app
    celery_app.set_current()
    yield gw.App("lazy")
    _state._tls.current_app = before


@pytest.fixture(autouse=True)
def _the_name_stays_in_its_test() -> Iterator[None]:
    """A shared task is given to every app of the process, and stays there."""
    yield
    for one in _state._get_active_apps():
        one._tasks.pop(NAME, None)


def declare_plain(celery_app: Celery, how: str) -> None:
    if how == "shared":
        shared_task(name=NAME)(plain)
    elif how == "used":
        assert celery_app.task(name=NAME)(plain).name == NAME
    else:
        celery_app.task(name=NAME, shared=how != "not shared")(plain)
    if how == "finalized":
        celery_app.finalize()


@pytest.mark.parametrize("is_class", [False, True])
def test_a_service_with_the_name_of_a_plain_task_is_refused(app, is_class) -> None:
    declare_plain(app.celery, "finalized")
    error = refused(app.cls, Model()) if is_class else refused(app.remote(name=NAME), ours)

    assert (error.argument, error.value) == ("name", NAME)
    assert f"the plain Celery task {PLAIN}" in error.rule
    assert f"{__name__}.{'Model' if is_class else 'ours'} and" in error.rule


@pytest.mark.parametrize("how", ["pending", "not shared", "used", "shared"])
def test_it_is_refused_when_celery_makes_its_task(app, how) -> None:
    declare_plain(app.celery, how)
    app.remote(name=NAME)(ours)

    assert PLAIN in refused(app.celery.finalize).rule


def test_it_is_refused_at_its_first_use_at_the_latest(app) -> None:
    declare_plain(app.celery, "used")
    task = app.remote(name=NAME)(ours)

    assert PLAIN in refused(lambda: task.name).rule


def test_a_lazy_app_is_refused_the_name_of_a_plain_task_of_the_app_in_use(lazy) -> None:
    declare_plain(lazy.celery, "finalized")

    assert PLAIN in refused(lazy.remote(name=NAME), ours).rule


def test_a_lazy_app_is_refused_it_when_a_celery_app_gets_its_tasks() -> None:
    gw.App("lazy").remote(name=NAME)(ours)
    celery_app = Celery("late", broker="memory://", set_as_current=False)
    declare_plain(celery_app, "used")

    assert PLAIN in refused(celery_app.finalize).rule


def test_a_name_that_celery_makes_is_known_too(app: gw.App) -> None:
    app.celery.task(plain)
    app.celery.finalize()

    assert refused(app.remote(name=PLAIN), ours).value == PLAIN


def test_a_plain_task_of_another_celery_app_disturbs_no_service(app: gw.App) -> None:
    declare_plain(Celery("other", broker="memory://", set_as_current=False), "not shared")

    assert app.remote(name=NAME)(ours).name == NAME
    app.celery.finalize()
