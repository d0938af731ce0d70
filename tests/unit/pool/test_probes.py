from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

import gw_celery as gw
from gw_celery import conf
from gw_celery.pool import child_state, dispatch, probes
from gw_celery.pool import replica as pool_replica
from gw_celery.protocol import frames

DEADLINES = conf.Settings(
    boot_timeout=1, start_timeout=1, benchmark_timeout=1, drain_timeout=1, heartbeat_timeout=1e9
)
SLOTS = {"proj.Model": 2, "proj.other": 2, "": 1}


class Child:
    """A process that is told what to do, and of which only this is known."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.state = child_state.ChildState(settings=DEADLINES, now=0.0)
        self.state.loaded(0.0)
        self.slots = dispatch.Slots(SLOTS)
        self.checks: Any = None
        self.is_unfit = False
        self.is_ill = self.is_leaving = False
        self.reason = ""
        self.asked: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        return f"replica {self.number} (pid 100)"

    def send(self, order: tuple[Any, ...]) -> None:
        kind, call, service, method = order
        assert (kind, service) == (frames.Order.PROBE, "proj.Model")
        self.asked.append((call, method))


class Site:
    """Children with probes, on a clock that the test moves."""

    def __init__(self, *declared: gw.Probe, count: int = 1) -> None:
        self.made = [Child(number) for number in range(count)]
        self.alive = list(self.made)
        self.ended: list[str] = []
        setup = pool_replica.Setup(
            settings=conf.Settings(),
            slots=SLOTS,
            first={},
            probes=[("proj.Model", one) for one in declared],
        )
        pool: Any = self
        self.probing = probes.ChildProbes(setup, pool)
        self.changes = 0

    @property
    def child(self) -> Child:
        return self.made[0]

    def advance(self, child: Any, now: float) -> None:
        if child.state.current is child_state.State.PROBING and self.probing.have_started(
            child, now
        ):
            child.state.probed(now)
        if child.state.current is child_state.State.BENCHMARKING:
            child.state.measured(now)

    # -- what probes ask of a pool --

    def children(self) -> list[Any]:
        return list(self.alive)

    def end(self, child: Any, reason: str) -> None:
        self.alive.remove(child)
        self.ended.append(reason)

    @property
    def pool(self) -> Site:
        return self

    def slots_changed(self) -> None:
        self.changes += 1

    def enter(self, now: float = 0.0) -> Site:
        """All children have entered, and those without startup probes are READY."""
        for child in self.made:
            child.state.entered(now)
            self.advance(child, now)
        self.probing.call_due(now)
        return self

    def answer(self, now: float, is_ok: bool = True, child: Child | None = None) -> None:
        """The last call of a child is answered."""
        one: Any = child or self.child
        report = [frames.Report.PROBED, one.asked[-1][0], is_ok, "because", 0.01]
        self.probing.follow(one, report, now)
        self.probing.call_due(now)


def on(kind: str, **given: Any) -> gw.Probe:
    return gw.Probe.on(kind, kind=kind, **{"period_s": 10, "timeout_s": 3, "failures": 2, **given})


def test_a_child_without_probes_is_ready_at_once_and_costs_nothing() -> None:
    site = Site().enter()
    assert site.child.state.current is child_state.State.READY
    assert (site.child.checks, site.probing.next_in(5.0)) == (None, None)


def test_a_child_is_probing_until_all_its_startup_probes_have_passed() -> None:
    second = gw.Probe.on("second", kind="startup", period_s=10)
    site = Site(on("startup"), second, on("liveness")).enter()
    assert [method for _, method in site.child.asked] == ["startup", "second"]
    (call, _), _ = site.child.asked
    site.probing.follow(site.child, [frames.Report.PROBED, call, True, "", 0.01], 1.0)  # type: ignore[arg-type]
    assert site.child.state.current is child_state.State.PROBING
    site.answer(2.0)
    assert site.child.state.current is child_state.State.READY


def test_a_startup_probe_that_fails_too_often_ends_its_child(
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = Site(on("startup")).enter()
    site.answer(1.0, is_ok=False)
    assert "its startup probe Model.startup failed (1 of 2 in a row: because)" in caplog.text
    site.probing.call_due(10.0)
    site.answer(11.0, is_ok=False)
    (reason,) = site.ended
    assert reason == (
        "Worker exited prematurely: its startup probe Model.startup failed (2 of 2 in a row: "
        "because)."
    )
    assert site.child.reason in reason


def test_liveness_is_asked_on_its_own_period_at_any_rate_of_ticks() -> None:
    site = Site(on("liveness")).enter()
    first = site.probing.next_in(0.0)
    assert first is not None
    assert 1.0 <= first <= 10.0
    for now in range(100):  # a tick changes nothing before it is due
        if now < first:
            site.probing.call_due(float(now))
    assert site.child.asked == []
    site.probing.call_due(first)
    site.answer(first + 0.1)
    assert site.probing.next_in(first) == pytest.approx(10.0)


def test_a_child_whose_liveness_probe_hangs_is_ended_and_was_never_well() -> None:
    site = Site(on("liveness")).enter()
    while not site.ended:
        now = site.probing.next_in(0.0)
        assert now is not None
        site.probing.call_due(now)
        assert now < 10 * 2 + 3
    assert len(site.child.asked) == 1
    assert site.child.is_unfit
    assert "no answer within 3 s" in site.ended[0]


def test_a_child_that_was_well_before_is_not_to_blame_for_its_start() -> None:
    site = Site(on("liveness", failures=1)).enter()
    for is_ok in (True, False):
        now = site.probing.next_in(0.0) or 0.0
        site.probing.call_due(now)
        site.answer(now, is_ok=is_ok)
    assert len(site.ended) == 1
    assert site.child.is_ill
    assert not site.child.is_unfit


def test_a_service_takes_no_input_until_its_readiness_probe_has_passed() -> None:
    site = Site(on("readiness")).enter()
    child = site.child
    assert not child.slots.serves("proj.Model")
    assert child.slots.serves("proj.other")
    assert child.state.current is child_state.State.READY  # the other service wants inputs
    before = site.changes
    site.answer(0.1)
    assert child.slots.serves("proj.Model")
    assert site.changes > before
    assert site.probing.unready() == set()


def test_a_service_that_is_not_ready_in_any_child_is_told_and_elsewhere_it_goes_on() -> None:
    site = Site(on("readiness", failures=1), count=2).enter()
    one, other = site.made
    for child in site.made:
        site.answer(0.1, child=child)
    due = max(site.probing.next_in(0.1) or 0.0, 9.0)
    site.probing.call_due(due)
    site.answer(due, is_ok=False, child=one)
    assert not one.slots.serves("proj.Model")
    assert other.slots.serves("proj.Model")
    assert site.probing.unready() == set()
    site.answer(due, is_ok=False, child=other)
    assert site.probing.unready() == {"proj.Model"}


def test_nothing_is_unready_where_no_child_is_up() -> None:
    site = Site(on("startup"), on("readiness")).enter()
    assert site.probing.unready() == set()


def draining(*, is_leaving: bool) -> Site:
    """A child that has been draining for some periods of its probes."""
    site = Site(on("liveness", failures=1), on("readiness", failures=1)).enter()
    site.answer(0.0)
    site.child.asked.clear()
    site.child.state.drain(1.0, math.inf)
    site.child.is_leaving = is_leaving
    site.probing.expect_changes()
    for now in range(1, 15):
        site.probing.call_due(float(now))
    return site


def test_a_child_that_drains_is_asked_whether_it_lives_and_nothing_else() -> None:
    site = draining(is_leaving=False)
    assert {method for _, method in site.child.asked} == {"liveness"}
    (why,) = site.ended
    assert "its liveness probe Model.liveness failed (1 of 1 in a row: no answer within 3 s)" in why


def test_a_child_that_leaves_is_asked_no_more() -> None:
    site = draining(is_leaving=True)
    assert (site.child.asked, site.ended) == ([], [])
    assert site.probing.next_in(15.0) is None


def test_an_answer_that_was_not_asked_for_is_ignored() -> None:
    site = Site(on("liveness", failures=1)).enter()
    child: Any = site.child
    site.probing.follow(child, [frames.Report.PROBED, 12345, False, "", 0.0], 1.0)
    site.probing.follow(Child(), [frames.Report.PROBED, 1, False, "", 0.0], 1.0)  # type: ignore[arg-type]
    assert site.ended == []


def test_replicas_are_not_all_asked_at_once() -> None:
    site = Site(on("liveness"), count=8).enter()
    dues = sorted(child.checks.next_at for child in site.made)
    assert min(after - before for before, after in itertools.pairwise(dues)) > 0.3
    assert all(1.0 <= due <= 10.0 for due in dues)
    assert not math.isinf(dues[-1])


def test_a_probe_that_goes_on_failing_is_not_logged_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = Site(on("readiness")).enter()
    for _ in range(20):
        now = site.probing.next_in(0.0) or 0.0
        site.probing.call_due(now)
        site.answer(now, is_ok=False)
    assert len(site.child.asked) == 20
    assert caplog.text.count("failed (") == 2
    assert caplog.text.count("takes no inputs of proj.Model until its readiness probe") == 1
