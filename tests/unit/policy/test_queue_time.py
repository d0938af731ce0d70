"""How long an input would wait, from what workers tell each other."""

from __future__ import annotations

import pytest

from gw_celery.policy import queue_time
from gw_celery.policy.queue_time import Load


def test_the_wait_is_what_is_ahead_over_what_is_done_in_a_second() -> None:
    assert queue_time.estimate(30.0, 10.0, 4.0) == 10.0


def test_an_empty_queue_is_no_wait_however_slow_the_service() -> None:
    assert queue_time.estimate(0.0, 0.0, None) == 0.0
    assert queue_time.estimate(0.0, 0.0, 0.1) == 0.0


@pytest.mark.parametrize("rate", [None, 0.0])
def test_nobody_can_tell_while_nothing_serves(rate: float | None) -> None:
    assert queue_time.estimate(10.0, 0.0, rate) is None


def test_the_loads_of_workers_add_up_and_one_that_has_served_nothing_adds_no_rate() -> None:
    loads = [Load(waiting=3.0, rate=2.0), Load(waiting=1.0, rate=None), Load(rate=1.0)]
    assert queue_time.together(loads) == Load(waiting=4.0, rate=3.0)
    assert queue_time.together([Load(waiting=1.0)]) == Load(waiting=1.0, rate=None)
    assert queue_time.together([]) == Load()


@pytest.mark.parametrize(
    ("rates", "parts", "expected"),
    [
        ({"slow": 2.0}, {"slow": 7.0}, 2.0),
        ({"slow": 2.0, "quick": 900.0}, {"slow": 98.0, "quick": 2.0}, 2.0 / 0.98),
        ({"slow": 2.0, "quick": 900.0}, {"quick": 5.0}, 900.0),
        ({"slow": 2.0, "quick": 8.0}, {"slow": 1.0, "quick": 4.0}, 10.0),
        ({"slow": 2.0, "quick": 900.0}, {}, 2.0),
        ({"slow": None, "quick": 9.0}, {"slow": 98.0, "quick": 2.0}, 9.0),
        ({"slow": 0.0, "quick": 9.0}, {"slow": 1.0, "quick": 1.0}, 9.0),
        ({"slow": None}, {"slow": 1.0}, None),
    ],
)
def test_of_services_that_share_a_queue_the_slowest_for_its_part_sets_the_pace(
    rates: dict[str, float | None], parts: dict[str, float], expected: float | None
) -> None:
    assert queue_time.shared(rates, parts) == (
        None if expected is None else pytest.approx(expected)
    )


def test_the_part_of_a_service_is_what_came_of_late() -> None:
    part = queue_time.Part()
    assert part.observe(10.0) == 10.0
    for _ in range(300):
        found = part.observe(10.0)
    assert found < 0.1
    assert part.observe(15.0) == pytest.approx(5.0, rel=0.02)


def test_the_pace_is_that_of_a_taken_slot_and_idleness_does_not_lower_it() -> None:
    pace = queue_time.Pace()
    assert pace.observe(0.0, 0.0) is None
    assert pace.observe(10.0, 2.0) == 5.0
    for _ in range(100):
        assert pace.observe(10.0, 2.0) == 5.0


def test_a_service_that_becomes_slower_is_found_out_within_minutes() -> None:
    pace, served, busy = queue_time.Pace(), 0.0, 0.0
    for _ in range(600):
        served, busy = served + 10.0, busy + 1.0
        pace.observe(served, busy)
    for _ in range(120):
        served, busy = served + 1.0, busy + 1.0
        found = pace.observe(served, busy)
    assert found is not None
    assert found < 2.0


def test_what_a_worker_writes_others_read() -> None:
    for load in (Load(waiting=2.5, rate=None), Load(waiting=0.0, rate=4.0)):
        assert queue_time.read(queue_time.write(load, 7)) == load


@pytest.mark.parametrize("text", ["", "x", "[1, 2]", '[1, "a", 2]', "{}", "[1, null, null]", "3"])
def test_what_another_version_wrote_is_left_out(text: str) -> None:
    assert queue_time.read(text) is None


def test_a_worker_that_falls_silent_is_not_counted_and_then_struck_off() -> None:
    told = queue_time.Told(lifetime=5.0)
    for turn in range(20):
        here = {
            "a": queue_time.write(Load(rate=1.0), turn),
            "b": queue_time.write(Load(rate=2.0), 0),
        }
        loads = told.hear(here, float(turn))
        assert loads == ([Load(rate=1.0), Load(rate=2.0)] if turn <= 5 else [Load(rate=1.0)])
    assert told.silent(19.0) == []
    told.hear({"a": queue_time.write(Load(), 99), "b": here["b"]}, 60.0)
    assert told.silent(60.0) == ["b"]
