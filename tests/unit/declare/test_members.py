"""Marks that a class carries where they could never work."""

from __future__ import annotations

from typing import Any

import pytest

import gw_celery as gw
from tests.unit.refusals import refused

HOOKS = pytest.mark.parametrize("mark", [gw.on_enter, gw.on_exit])
MARKS = pytest.mark.parametrize("mark", [gw.on_enter, gw.on_exit, gw.method])


def model(**members: Any) -> type:
    """A class with one method that works, and ``members``."""

    def predict(self): ...

    return type("Model", (), {"predict": gw.method()(predict), **members})


def generator(self):
    yield 1


async def async_generator(self):
    yield 1


@HOOKS
def test_a_hook_that_needs_arguments_is_refused(app: gw.App, mark) -> None:
    @mark()
    def load(self, path): ...

    error = refused(app.cls, model(load=load))

    assert (error.argument, error.value) == (f"gw.{mark.__name__}", "load")
    assert "with `self` alone" in error.rule
    assert "'path'" in error.rule


@HOOKS
def test_a_hook_without_self_is_refused(app: gw.App, mark) -> None:
    @mark()
    def load(): ...

    assert refused(app.cls, model(load=load)).argument == f"gw.{mark.__name__}"


@HOOKS
def test_a_hook_with_defaults_is_taken(app: gw.App, mark) -> None:
    @mark()
    def load(self, path="/models", *, retries=3): ...

    made = model(load=load)

    assert app.cls(made) is made


@HOOKS
def test_a_method_that_is_a_hook_too_is_refused(app: gw.App, mark) -> None:
    @gw.method()
    @mark()
    def load(self): ...

    error = refused(app.cls, model(load=load))

    assert (error.argument, error.value) == ("gw.method", "load")
    assert "take one mark away" in error.rule


def test_a_hook_may_be_both_kinds_of_hook(app: gw.App) -> None:
    @gw.on_enter()
    @gw.on_exit()
    def reset(self): ...

    app.cls(model(reset=reset))
    (service,) = app.registry.services.values()

    assert service.enter_hooks == service.exit_hooks == ("reset",)


@MARKS
@pytest.mark.parametrize("wrapper", [staticmethod, classmethod])
def test_a_mark_above_staticmethod_or_classmethod_says_what_to_take_away(mark, wrapper) -> None:
    error = refused(mark(), wrapper(lambda *args: args))

    assert error.argument == f"gw.{mark.__name__}"
    assert f"take @{wrapper.__name__} away" in error.rule


@MARKS
@pytest.mark.parametrize("wrapper", [staticmethod, classmethod, property])
def test_a_mark_below_staticmethod_or_classmethod_is_refused(app: gw.App, mark, wrapper) -> None:
    @mark()
    def load(self): ...

    error = refused(app.cls, model(load=wrapper(load)))

    assert (error.argument, error.value) == (f"gw.{mark.__name__}", "load")
    assert f"take @{wrapper.__name__} away" in error.rule


@MARKS
@pytest.mark.parametrize("fn", [generator, async_generator])
def test_a_method_or_hook_that_yields_is_refused(app: gw.App, mark, fn, monkeypatch) -> None:
    monkeypatch.setattr(fn, "__dict__", {})
    error = refused(app.cls, model(many=mark()(fn)))

    assert (error.argument, error.value) == (f"gw.{mark.__name__}", fn.__qualname__)
    assert "return one value, or a list" in error.rule


@pytest.mark.parametrize("fn", [generator, async_generator])
def test_a_remote_function_that_yields_is_refused(app: gw.App, fn) -> None:
    error = refused(app.remote, fn)

    assert (error.argument, error.value) == ("fn", fn.__qualname__)
    assert "return one value, or a list" in error.rule
