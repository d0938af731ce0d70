"""Probes of children: when they are called, and what follows from their answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

import gw_celery as gw
from tests.pool_harness import Child, Harness

StartPool = Callable[..., Harness]
MODEL = f"{__name__}.Model.run"
STARTUP, LIVENESS, READINESS = "startup", "liveness", "readiness"


def on(kind: str, method: str | None = None, **given: Any) -> gw.Probe:
    limits = {"period_s": 10, "timeout_s": 3, "failures": 2, **given}
    return gw.Probe.on(method or kind, kind=kind, **limits)


@pytest.fixture
def probed(start_pool: StartPool) -> Callable[..., Harness]:
    """Start a pool with the service ``work``, and the class task ``Model`` with these probes."""

    def start(*probes: gw.Probe, **options: Any) -> Harness:
        def declare(app: gw.App) -> None:
            class Model:
                @gw.method()
                async def run(self) -> None: ...
                @gw.method()
                async def startup(self) -> None: ...
                @gw.method()
                async def second(self) -> None: ...
                @gw.method()
                async def liveness(self) -> None: ...
                @gw.method()
                async def readiness(self) -> None: ...

            Model.__qualname__ = "Model"
            app.cls(gpu=gw.Gpu("CPU"), probes=list(probes))(Model)

        return start_pool(declare=declare, **options)

    return start


def until_asked(harness: Harness, child: Child, *, within: float = 11.0) -> float:
    """Let time pass until the child has been asked once more; when that was."""
    asked, end = len(child.probed), harness.now + within
    while len(child.probed) == asked:
        assert harness.now < end
        harness.advance(0.1)
    return harness.now


def test_a_child_is_probing_until_all_its_startup_probes_have_passed(
    probed: Callable[..., Harness],
) -> None:
    harness = probed(on(STARTUP), on(STARTUP, "second"), on(LIVENESS))
    child = harness.child(0)
    assert child.probed == ["startup", "second"]
    child.answer_probe(method="startup")
    assert harness.replica()["state"] == "probing"
    child.answer_probe(method="second")
    assert harness.replica()["state"] == "ready"


def test_a_startup_probe_that_fails_too_often_ends_its_child(
    probed: Callable[..., Harness], caplog: pytest.LogCaptureFixture
) -> None:
    harness = probed(on(STARTUP))
    child = harness.child(0)
    child.answer_probe(False)
    assert "its startup probe Model.startup failed (1 of 2 in a row: because)" in caplog.text
    until_asked(harness, child)
    child.answer_probe(False)
    assert child.exit_code == -9
    why = "its startup probe Model.startup failed (2 of 2 in a row: because)"
    assert f"Worker exited prematurely: {why}" not in harness.replica()["last_error"]
    assert harness.replica()["last_error"] == why


def test_liveness_is_asked_on_its_own_period(probed: Callable[..., Harness]) -> None:
    harness = probed(on(LIVENESS))
    child, began = harness.child(0), harness.now
    times = []
    for _ in range(4):
        times.append(until_asked(harness, child))
        child.answer_probe()
    assert 1.0 <= times[0] - began <= 10.2
    assert [after - before for before, after in itertools.pairwise(times)] == [
        pytest.approx(10.0, abs=0.2)
    ] * 3


def test_a_child_whose_liveness_probe_hangs_is_ended_and_was_never_well(
    probed: Callable[..., Harness],
) -> None:
    harness = probed(on(LIVENESS))
    for wait in (1, 2, 4):
        child = harness.child(0)
        lost = harness.submit()
        child.accept(lost)
        until_asked(harness, child)
        harness.advance(2.9)
        assert child.is_alive
        harness.advance(10.2)
        assert child.exit_code == -9
        assert (len(child.probed), lost.heard) == (1, ["accepted", "WorkerLostError"])
        seen = harness.pool.snapshot().replicas[0]
        assert "no answer within 3 s" in seen.last_error
        assert wait - 0.5 < seen.retry_in <= wait, "as after a start that failed"
        harness.advance(wait + 1.0)
        harness.child(0).ready()


@pytest.mark.parametrize(("age", "is_to_blame"), [(20.0, True), (70.0, False)])
def test_a_child_that_was_well_for_long_is_not_to_blame_for_its_start(
    probed: Callable[..., Harness], age: float, *, is_to_blame: bool
) -> None:
    harness = probed(on(LIVENESS, failures=1))
    child, end = harness.child(0), harness.now + age
    while harness.now < end:
        until_asked(harness, child)
        child.answer_probe()
    until_asked(harness, child)
    child.answer_probe(False)
    assert child.exit_code == -9
    seen = harness.pool.snapshot().replicas[0]
    assert (seen.state == "failed", seen.retry_in > 0) == (is_to_blame, is_to_blame)


def test_a_service_takes_no_input_until_its_readiness_probe_has_passed(
    probed: Callable[..., Harness],
) -> None:
    harness = probed(on(READINESS))
    child = harness.child(0)
    waits, goes_on = harness.submit(MODEL), harness.submit("work")
    assert child.runs == [goes_on.id]
    assert harness.pool.snapshot().replicas[0].unready == (f"{__name__}.Model",)
    child.answer_probe()
    assert child.runs == [goes_on.id, waits.id]
    assert harness.pool.snapshot().replicas[0].unready == ()
    for request in (waits, goes_on):
        child.done(request)


def test_what_waits_for_a_service_that_no_child_is_ready_for_goes_to_other_workers(
    probed: Callable[..., Harness],
) -> None:
    harness = probed(on(READINESS, failures=1), replicas=2)
    one, other = harness.children
    for child in (one, other):
        child.answer_probe()
    probes = {0: 1, 1: 1}
    for failing in (one, other):
        asked, end = len(failing.probed), harness.now + 60.0
        while len(failing.probed) == asked:
            assert harness.now < end
            harness.advance(0.1)
            for child in (one, other):
                if child is not failing and len(child.probed) > probes[child.number]:
                    child.answer_probe(child is not one)
                probes[child.number] = len(child.probed)
        failing.answer_probe(False)
        request = harness.submit(MODEL)
        if failing is one:
            assert (one.runs, other.runs) == ([], [request.id])
            other.done(request)
    harness.advance(1.0)
    assert request.heard == ["given back"]


def draining(probed: Callable[..., Harness]) -> tuple[Harness, Child, Any]:
    """A child that drains, and is kept by an input without a limit."""
    harness = probed(on(LIVENESS, failures=1), on(READINESS, failures=1))
    child = harness.child(0)
    child.answer_probe(method="readiness")
    request = harness.submit()
    child.accept(request)
    harness.pool.hold(0)
    return harness, child, request


def test_a_child_that_drains_is_asked_whether_it_lives_and_nothing_else(
    probed: Callable[..., Harness],
) -> None:
    harness, child, _ = draining(probed)
    harness.advance(15.0)
    assert child.probed == ["readiness", "liveness"]
    assert child.exit_code == -9
    assert "its liveness probe Model.liveness failed" in harness.requests[0].answer.args[0]


def test_a_child_that_leaves_is_asked_no_more(probed: Callable[..., Harness]) -> None:
    harness, child, request = draining(probed)
    child.done(request)
    assert child.is_leaving
    harness.advance(15.0)
    assert child.probed == ["readiness"]


def test_an_answer_that_was_not_asked_for_is_ignored(probed: Callable[..., Harness]) -> None:
    harness = probed(on(LIVENESS, failures=1))
    child = harness.child(0)
    until_asked(harness, child)
    child.answer_probe()
    child.answer_probe(False)
    assert child.is_alive


def test_replicas_are_not_all_asked_at_once(probed: Callable[..., Harness]) -> None:
    harness = probed(on(LIVENESS), replicas=8)
    began, asked = harness.now, dict[int, float]()
    while len(asked) < 8:
        assert harness.now < began + 60.0
        harness.advance(0.1)
        for child in harness.children:
            if child.probed:
                asked.setdefault(child.number, harness.now - began)
    times = sorted(asked.values())
    assert min(after - before for before, after in itertools.pairwise(times)) > 0.3
    assert all(1.0 <= time <= 10.2 for time in times)


def test_a_probe_that_goes_on_failing_is_not_logged_for_ever(
    probed: Callable[..., Harness], caplog: pytest.LogCaptureFixture
) -> None:
    harness = probed(on(READINESS))
    child = harness.child(0)
    for _ in range(20):
        child.answer_probe(False)
        until_asked(harness, child)
    assert caplog.text.count("failed (") == 2
    assert caplog.text.count("until its readiness probe") == 1


def test_operators_see_what_the_probes_said(probed: Callable[..., Harness]) -> None:
    harness = probed(on(READINESS, failures=1))
    unasked = {"name": "Model.readiness", "kind": "readiness", "is_ok": None, "failures": 0}
    (seen,) = harness.replica()["probes"]
    assert {name: seen[name] for name in unasked} == unasked
    harness.child(0).answer_probe(False, detail="returned False")
    (seen,) = harness.replica()["probes"]
    assert (seen["is_ok"], seen["failures"], seen["is_failing"]) == (False, 1, True)
    assert (seen["detail"], seen["seconds"]) == ("returned False", 0.01)


def test_a_replica_that_is_not_ready_is_restarted_at_once(start_pool: StartPool) -> None:
    def declare(app: gw.App) -> None:
        class Model:
            @gw.method()
            async def readiness(self) -> None: ...

        app.cls(gpu=gw.Gpu("CPU"), probes=[on(READINESS)])(Model)

    harness = start_pool({}, declare=declare, replicas=2)
    ready, unready = harness.children
    ready.answer_probe()
    harness.pool.restart()
    harness.advance(1.0)
    assert (ready.is_leaving, unready.is_leaving) == (False, True)
    harness.advance(5.0)
    assert not ready.is_leaving, "the other one waits until it is ready"
    unready.die(code=0)
    harness.advance(2.0)
    harness.child(1).ready()
    harness.child(1).answer_probe()
    harness.advance(1.0)
    assert ready.is_leaving
    ready.die(code=0)
