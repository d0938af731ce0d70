from __future__ import annotations

import math

import pytest

import gw_celery as gw
from gw_celery.policy import probes
from gw_celery.policy.probes import Consequence

OK = probes.Answer(is_ok=True, detail="", seconds=0.01)
BAD = probes.Answer(is_ok=False, detail="returned False", seconds=0.01)


def a_check(kind: str, phase: float = 1.0, **given: float) -> probes.Check:
    """A probe every 10 s with 3 s to answer, which may fail twice."""
    options = {"period_s": 10, "timeout_s": 3, "failures": 2, **given}
    return probes.Check("proj.Model", gw.Probe.on("health", kind=kind, **options), phase)  # type: ignore[arg-type]


def checks(*kinds: str) -> probes.Checks:
    declared = [(f"proj.{number}", a_check(kind).probe) for number, kind in enumerate(kinds)]
    return probes.Checks(declared)


def asked(check: probes.Check, now: float, call: int = 1) -> probes.Check:
    check.called(call, now)
    return check


def follow(check: probes.Check, *answers: probes.Answer) -> list[Consequence]:
    """The consequences of answers, each to a call of its own."""
    consequences = []
    for number, answer in enumerate(answers):
        check.called(number, 100.0 + number * 10)
        consequences.append(check.answered(answer))
    return consequences


def test_a_probe_that_nothing_waits_for_is_first_called_after_its_part_of_a_period() -> None:
    check = a_check("liveness", phase=0.25)
    assert not check.is_due(1e9)
    check.begin(100)
    assert check.due == 102.5
    assert not check.is_due(102.4)
    assert check.is_due(102.5)


@pytest.mark.parametrize("kind", ["startup", "readiness"])
def test_a_probe_that_something_waits_for_is_called_at_once_and_shifted_after_that(
    kind: str,
) -> None:
    check = a_check(kind, phase=0.25)
    check.begin(100)
    assert check.is_due(100)
    check.called(1, 100)
    assert check.due == 102.5
    check.answered(BAD)
    check.called(2, 102.5)
    assert check.due == 112.5


def test_beginning_twice_does_not_move_the_next_call() -> None:
    check = a_check("liveness")
    check.begin(100)
    check.begin(105)
    assert check.due == 110


NOTHING, NOT_READY, READY = Consequence.NOTHING, Consequence.NOT_READY, Consequence.READY


@pytest.mark.parametrize(
    ("kind", "answers", "consequences"),
    [
        # As many failures in a row as it may have are acted on, once.
        ("startup", [BAD] * 4, [NOTHING, Consequence.CANNOT_START, NOTHING, NOTHING]),
        ("liveness", [BAD] * 4, [NOTHING, Consequence.REPLACE, NOTHING, NOTHING]),
        ("readiness", [BAD] * 4, [NOTHING, NOT_READY, NOTHING, NOTHING]),
        # A success begins the count anew.
        ("liveness", [BAD, OK, BAD, OK, BAD, BAD], [*[NOTHING] * 5, Consequence.REPLACE]),
        # Ready with the first success, and with the first after it was lost.
        ("readiness", [BAD, OK, OK], [NOTHING, READY, NOTHING]),
        (
            "readiness",
            [OK, BAD, OK, BAD, BAD, BAD, OK, OK],
            [READY, NOTHING, NOTHING, NOTHING, NOT_READY, NOTHING, READY, NOTHING],
        ),
    ],
)
def test_what_follows_from_the_answers_of_a_probe_that_may_fail_twice(
    kind: str, answers: list[probes.Answer], consequences: list[Consequence]
) -> None:
    assert follow(a_check(kind), *answers) == consequences


def test_failures_are_counted_while_they_last() -> None:
    check = a_check("liveness")
    follow(check, OK, BAD, BAD, BAD)
    assert (check.failures, check.is_failing, check.last) == (3, True, BAD)


def test_a_startup_probe_that_has_passed_is_not_called_again() -> None:
    check = a_check("startup")
    check.begin(100)
    check.called(1, 100)
    assert check.answered(OK) is Consequence.STARTED
    assert check.due == math.inf
    assert check.next_at == math.inf


def test_a_call_without_an_answer_is_a_failure_at_its_time_out() -> None:
    check = asked(a_check("liveness"), 100)
    assert check.next_at == 103
    assert check.give_up(103) is Consequence.NOTHING
    assert check.last is not None
    assert (check.failures, check.last.detail) == (1, "no answer within 3 s")


def test_while_a_call_hangs_none_is_made_and_each_period_is_another_failure() -> None:
    check = asked(a_check("liveness"), 100)
    check.give_up(103)
    assert not check.is_due(1000)
    assert check.next_at == 113
    assert check.give_up(113) is Consequence.REPLACE


def test_a_late_answer_counts_for_nothing_but_lets_the_probe_be_called_again() -> None:
    check = asked(a_check("readiness"), 100)
    check.give_up(103)
    assert check.answered(OK) is Consequence.NOTHING
    assert (check.failures, check.has_passed) == (1, False)
    assert not check.is_due(109)
    assert check.is_due(110)


def test_a_hung_replica_is_found_within_the_periods_and_one_time_out() -> None:
    for period, timeout, failures in [(1, 5, 3), (30, 5, 3), (0.5, 0.5, 1)]:
        check = a_check("liveness", period_s=period, timeout_s=timeout, failures=failures)
        check.begin(0)
        check.called(1, 0)
        check.answered(OK)
        hung_since, now = 0.001, check.due
        check.called(2, now)
        while (consequence := check.give_up(now := check.next_at)) is Consequence.NOTHING:
            assert now < 1000
        assert consequence is Consequence.REPLACE
        assert now - hung_since <= period * failures + timeout


def test_an_answer_that_the_parent_reads_late_was_in_time_by_the_childs_clock() -> None:
    check = asked(a_check("liveness", failures=1), 100)
    assert check.answered(OK) is Consequence.NOTHING
    assert check.has_passed
    check.called(2, 110)
    slow = probes.Answer(is_ok=True, detail="fine", seconds=3.5)
    assert check.answered(slow) is Consequence.REPLACE
    assert check.last is not None
    assert check.last.detail == "no answer within 3 s"


def test_a_call_that_the_child_gave_up_had_no_answer_in_time() -> None:
    check = asked(a_check("liveness"), 100)
    check.answered(probes.Answer(is_ok=False, detail="TimeoutError", seconds=3.01))
    assert check.last is not None
    assert (check.failures, check.last.detail) == (1, "no answer within 3 s")


def test_nothing_counts_for_the_time_in_which_the_parent_could_not_read() -> None:
    all_checks = checks("liveness")
    (check,) = all_checks
    all_checks.serve(0)
    assert all_checks.overdue(9.5) == []
    check.called(1, 10)
    assert all_checks.overdue(10.5) == []
    assert all_checks.overdue(60) == []  # it was away for 49.5 s
    assert all_checks.overdue(61.5) == []
    assert all_checks.overdue(62.4) == []
    assert all_checks.overdue(62.6) == [(check, Consequence.NOTHING)]


def test_a_parent_that_is_always_late_finds_a_hung_replica_all_the_same() -> None:
    all_checks = checks("liveness")
    (check,) = all_checks
    all_checks.serve(0)
    check.called(1, 10)
    looks = [all_checks.overdue(now) for now in (10, 15, 20, 25, 30)]
    assert [bool(counted) for counted in looks] == [False, False, True, False, True]


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
    assert [check.probe.kind for check in all_checks.due(300)] == ["readiness"]
    assert [check.probe.kind for check in all_checks.due(310)] == ["liveness", "readiness"]


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
    (check,) = all_checks
    all_checks.serve(0)
    follow(check, BAD)
    check.called(9, 100)
    all_checks.end()
    assert all_checks.next_at == math.inf
    assert all_checks.overdue(1e6) == []
    assert check.answered(BAD) is Consequence.NOTHING
    assert all_checks.due(1e9) == []


def test_a_probe_is_named_as_its_users_write_it() -> None:
    assert a_check("liveness").name == "Model.health"
