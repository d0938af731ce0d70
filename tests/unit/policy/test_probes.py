from __future__ import annotations

import math

import pytest

import gw_celery as gw
from gw_celery.policy import probes
from gw_celery.policy.probes import Consequence

OK = probes.Answer(is_ok=True, detail="", seconds=0.01)
BAD = probes.Answer(is_ok=False, detail="returned False", seconds=0.01)


def check(kind: str, phase: float = 1.0, **given: float) -> probes.Check:
    """A probe every 10 s with 3 s to answer, which may fail twice."""
    options = {"period_s": 10, "timeout_s": 3, "failures": 2, **given}
    return probes.Check("proj.Model", gw.Probe.on("health", kind=kind, **options), phase)  # type: ignore[arg-type]


def checks(*kinds: str) -> probes.Checks:
    declared = [(f"proj.{number}", check(kind).probe) for number, kind in enumerate(kinds)]
    return probes.Checks(declared)


def asked(one: probes.Check, now: float, call: int = 1) -> probes.Check:
    one.called(call, now)
    return one


def follow(one: probes.Check, *answers: probes.Answer) -> list[Consequence]:
    """What follows from one answer after the other, each to a call of its own."""
    found = []
    for number, answer in enumerate(answers):
        one.called(number, 100.0 + number * 10)
        found.append(one.answered(answer))
    return found


def test_a_probe_that_nothing_waits_for_is_first_called_after_its_part_of_a_period() -> None:
    one = check("liveness", phase=0.25)
    assert not one.is_due(1e9)
    one.begin(100)
    assert one.due == 102.5
    assert not one.is_due(102.4)
    assert one.is_due(102.5)


@pytest.mark.parametrize("kind", ["startup", "readiness"])
def test_a_probe_that_something_waits_for_is_called_at_once_and_shifted_after_that(
    kind: str,
) -> None:
    one = check(kind, phase=0.25)
    one.begin(100)
    assert one.is_due(100)
    one.called(1, 100)
    assert one.due == 102.5
    one.answered(BAD)
    one.called(2, 102.5)
    assert one.due == 112.5


def test_beginning_twice_does_not_move_the_next_call() -> None:
    one = check("liveness")
    one.begin(100)
    one.begin(105)
    assert one.due == 110


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("startup", Consequence.CANNOT_START),
        ("liveness", Consequence.REPLACE),
        ("readiness", Consequence.NOT_READY),
    ],
)
def test_only_as_many_failures_in_a_row_as_it_may_have_are_acted_on_and_once(
    kind: str, what: Consequence
) -> None:
    one = check(kind)
    nothing = Consequence.NOTHING
    assert follow(one, BAD, BAD, BAD, BAD) == [nothing, what, nothing, nothing]
    assert (one.failures, one.is_failing, one.last) == (4, True, BAD)


def test_a_success_begins_the_count_anew() -> None:
    one = check("liveness")
    assert follow(one, BAD, OK, BAD, OK, BAD) == [Consequence.NOTHING] * 5
    assert follow(one, BAD) == [Consequence.REPLACE]


def test_readiness_comes_with_its_first_success_and_with_the_first_after_it_was_lost() -> None:
    one = check("readiness")
    said = follow(one, BAD, OK, OK, BAD, OK, BAD, BAD, BAD, OK, OK)
    assert [number for number, what in enumerate(said) if what is Consequence.READY] == [1, 8]
    assert said[6] is Consequence.NOT_READY


def test_a_startup_probe_that_has_passed_is_not_called_again() -> None:
    one = check("startup")
    one.begin(100)
    one.called(1, 100)
    assert one.answered(OK) is Consequence.STARTED
    assert one.due == math.inf
    assert one.next_at == math.inf


def test_a_call_without_an_answer_is_a_failure_at_its_time_out() -> None:
    one = asked(check("liveness"), 100)
    assert one.next_at == 103
    assert not one.is_overdue(102.9)
    assert one.is_overdue(103)
    assert one.give_up(103) is Consequence.NOTHING
    assert one.last is not None
    assert (one.failures, one.last.detail) == (1, "no answer within 3 s")


def test_while_a_call_hangs_none_is_made_and_each_period_is_another_failure() -> None:
    one = asked(check("liveness"), 100)
    one.give_up(103)
    assert not one.is_due(1000)
    assert one.next_at == 113
    assert one.give_up(113) is Consequence.REPLACE


def test_a_late_answer_counts_for_nothing_but_lets_the_probe_be_called_again() -> None:
    one = asked(check("readiness"), 100)
    one.give_up(103)
    assert one.answered(OK) is Consequence.NOTHING
    assert (one.failures, one.has_passed) == (1, False)
    assert not one.is_due(109)
    assert one.is_due(110)


def test_a_hung_replica_is_found_within_the_periods_and_one_time_out() -> None:
    for period, timeout, failures in [(1, 5, 3), (30, 5, 3), (0.5, 0.5, 1)]:
        one = check("liveness", period_s=period, timeout_s=timeout, failures=failures)
        one.begin(0)
        one.called(1, 0)
        one.answered(OK)
        hung_since, now = 0.001, one.due
        one.called(2, now)
        while (what := one.give_up(now := one.next_at)) is Consequence.NOTHING:
            assert now < 1000
        assert what is Consequence.REPLACE
        assert now - hung_since <= period * failures + timeout


def test_an_answer_that_the_parent_reads_late_was_in_time_by_the_childs_clock() -> None:
    one = asked(check("liveness", failures=1), 100)
    assert one.answered(OK) is Consequence.NOTHING
    assert one.has_passed
    one.called(2, 110)
    slow = probes.Answer(is_ok=True, detail="fine", seconds=3.5)
    assert one.answered(slow) is Consequence.REPLACE
    assert one.last is not None
    assert one.last.detail == "no answer within 3 s"


def test_a_call_that_the_child_gave_up_had_no_answer_in_time() -> None:
    one = asked(check("liveness"), 100)
    one.answered(probes.Answer(is_ok=False, detail="TimeoutError", seconds=3.01))
    assert one.last is not None
    assert (one.failures, one.last.detail) == (1, "no answer within 3 s")


def test_nothing_counts_for_the_time_in_which_the_parent_could_not_read() -> None:
    all_checks = checks("liveness")
    (one,) = all_checks
    all_checks.serve(0)
    assert all_checks.overdue(9.5) == []
    one.called(1, 10)
    assert all_checks.overdue(10.5) == []
    assert all_checks.overdue(60) == []  # it was away for 49.5 s
    assert all_checks.overdue(61.5) == []
    assert all_checks.overdue(62.4) == []
    assert all_checks.overdue(62.6) == [(one, Consequence.NOTHING)]


def test_a_parent_that_is_always_late_finds_a_hung_replica_all_the_same() -> None:
    all_checks = checks("liveness")
    (one,) = all_checks
    all_checks.serve(0)
    one.called(1, 10)
    looks = [all_checks.overdue(now) for now in (10, 15, 20, 25, 30)]
    assert [bool(found) for found in looks] == [False, False, True, False, True]


def test_liveness_and_readiness_wait_until_the_child_serves() -> None:
    all_checks = checks("startup", "liveness", "readiness")
    all_checks.start(100)
    (startup,) = all_checks.due(200)
    assert startup.probe.kind == "startup"
    assert not all_checks.have_started
    startup.called(1, 200)
    assert all_checks.find(1) is startup
    startup.answered(OK)
    assert all_checks.have_started
    assert all_checks.due(1000) == []
    assert all_checks.serve(300)
    assert not all_checks.serve(301)
    assert [one.probe.kind for one in all_checks.due(300)] == ["readiness"]
    assert [one.probe.kind for one in all_checks.due(310)] == ["liveness", "readiness"]


def test_a_service_is_unready_until_each_of_its_readiness_probes_has_passed() -> None:
    all_checks = checks("readiness", "liveness", "readiness")
    first, _, second = all_checks
    assert all_checks.unready == {"proj.0", "proj.2"}
    follow(first, OK)
    assert all_checks.unready == {"proj.2"}
    follow(second, OK)
    follow(first, BAD)
    assert all_checks.unready == set()
    follow(first, BAD)
    assert all_checks.unready == {"proj.0"}


def test_without_probes_everything_has_started_and_nothing_is_ever_due() -> None:
    none = checks()
    assert none.have_started
    assert (none.next_at, none.due(1e9), none.unready) == (math.inf, [], set())


def test_what_was_ended_is_called_no_more_and_an_answer_has_no_consequence() -> None:
    all_checks = checks("liveness")
    (one,) = all_checks
    all_checks.serve(0)
    follow(one, BAD)
    one.called(9, 100)
    all_checks.end()
    assert all_checks.next_at == math.inf
    assert all_checks.overdue(1e6) == []
    assert one.answered(BAD) is Consequence.NOTHING
    assert all_checks.due(1e9) == []


def test_a_probe_is_named_as_its_users_write_it() -> None:
    assert check("liveness").name == "Model.health"
