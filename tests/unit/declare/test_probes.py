from __future__ import annotations

import inspect

import pytest

import gw_celery as gw
from gw_celery.declare import probes
from tests.unit.refusals import NOT_FINITE, NOT_NUMBERS, refused

HEALTH = gw.Probe.on("health")
METHODS = {"health": inspect.Signature()}


def test_a_probe_has_the_defaults_that_are_documented() -> None:
    assert gw.Probe.on("health") == gw.Probe(
        method="health", kind="liveness", period_s=30.0, timeout_s=5.0, failures=3
    )


@pytest.mark.parametrize("kind", ["startup", "liveness", "readiness"])
def test_the_three_kinds_of_kubernetes_are_taken(kind: str) -> None:
    assert gw.Probe.on("health", kind=kind).kind == kind


@pytest.mark.parametrize("kind", ["live", "", None, 1, ["liveness"]])
def test_another_kind_is_refused(kind: object) -> None:
    error = refused(gw.Probe.on, "health", kind=kind)

    assert (error.argument, error.value) == ("kind", kind)
    assert "startup, liveness, readiness" in error.rule


@pytest.mark.parametrize("method", ["", None, 3, len])
def test_a_method_that_is_no_name_is_refused(method: object) -> None:
    error = refused(gw.Probe.on, method)

    assert (error.argument, error.value) == ("method", method)
    assert "name of a method" in error.rule


@pytest.mark.parametrize("argument", ["period_s", "timeout_s"])
@pytest.mark.parametrize("value", [0, -0.5, *NOT_FINITE, *NOT_NUMBERS])
def test_a_duration_that_is_not_over_0_is_refused(argument: str, value: object) -> None:
    error = refused(gw.Probe.on, "health", **{argument: value})

    assert error.argument == argument
    assert error.value is value
    assert "over 0" in error.rule


@pytest.mark.parametrize("failures", [0, -3, 1.0, *NOT_FINITE, *NOT_NUMBERS])
def test_a_number_of_failures_below_1_is_refused(failures: object) -> None:
    error = refused(gw.Probe.on, "health", failures=failures)

    assert error.argument == "failures"
    assert error.value is failures
    assert "1 or more" in error.rule


def test_a_probe_that_names_no_method_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method()
        def health(self): ...

        def private(self): ...

    error = refused(app.cls(probes=[gw.Probe.on("private")]), Model)

    assert (error.argument, error.value) == ("probes", "private")
    assert "names no @gw.method() of the class; it has: health" in error.rule


@pytest.mark.parametrize("value", ["health", HEALTH, [HEALTH, "health"], None, {HEALTH}])
def test_probes_that_are_no_list_of_probes_are_refused(value: object) -> None:
    error = refused(probes.require_methods, value, METHODS)

    assert (error.argument, error.value) == ("probes", value)
    assert "list of gw.Probe.on(...)" in error.rule


def test_a_list_of_probes_is_kept_in_order() -> None:
    listed = [gw.Probe.on("health"), gw.Probe.on("health", kind="readiness")]

    assert probes.require_methods(listed, METHODS) == tuple(listed)


def test_a_probe_of_a_method_that_needs_arguments_is_refused(app: gw.App) -> None:
    class Model:
        @gw.method()
        def health(self, depth): ...

    error = refused(app.cls(probes=[HEALTH]), Model)

    assert (error.argument, error.value) == ("probes", "health")
    assert "without arguments" in error.rule
    assert "'depth'" in error.rule


def test_a_probe_of_a_method_with_defaults_is_taken(app: gw.App) -> None:
    @app.cls(probes=[HEALTH])
    class Model:
        @gw.method()
        def health(self, depth=1): ...

    (service,) = app.registry.services.values()
    assert service.probes == (HEALTH,)


def test_the_same_probe_twice_is_refused() -> None:
    error = refused(probes.require_methods, [HEALTH, gw.Probe.on("health", period_s=5)], METHODS)

    assert (error.argument, error.value) == ("probes", "health")
    assert "a liveness probe twice" in error.rule
