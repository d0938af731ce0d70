"""How long an input would wait, from what workers tell each other."""

from __future__ import annotations

import pytest

from gw_celery.policy import queue_time
from gw_celery.protocol import snapshot
from gw_celery.protocol.snapshot import Counters
from gw_celery.protocol.worker_record import QueueLoad


def test_the_wait_is_what_is_ahead_over_what_is_done_in_a_second() -> None:
    assert queue_time.estimate(30.0, 10.0, 4.0) == 10.0


def test_an_empty_queue_is_no_wait_however_slow_the_service() -> None:
    assert queue_time.estimate(0.0, 0.0, None) == 0.0
    assert queue_time.estimate(0.0, 0.0, 0.1) == 0.0


@pytest.mark.parametrize("rate", [None, 0.0])
def test_there_is_no_estimate_while_nothing_serves(rate: float | None) -> None:
    assert queue_time.estimate(10.0, 0.0, rate) is None


def test_the_loads_of_workers_add_up_and_one_that_has_served_nothing_adds_no_rate() -> None:
    loads = [
        QueueLoad(waiting=3.0, rate=2.0),
        QueueLoad(waiting=1.0, rate=None),
        QueueLoad(rate=1.0),
    ]
    assert queue_time.together(loads) == QueueLoad(waiting=4.0, rate=3.0)
    assert queue_time.together([QueueLoad(waiting=1.0)]) == QueueLoad(waiting=1.0, rate=None)
    assert queue_time.together([]) == QueueLoad()


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


# -- what one worker tells --


def worker(
    counters: Counters, *, slots: int = 2, score: float | None = None, key: str = "embed"
) -> snapshot.Worker:
    return snapshot.Worker(
        hostname="w1",
        tallies={key: counters},
        ready_slots={key: slots},
        scores={key: snapshot.Score(value=score)},
    )


def test_a_load_is_at_the_pace_of_the_slots_until_there_is_a_score() -> None:
    loads = queue_time.Loads({"q": {"embed": 2}})
    assert loads.observe(worker(Counters(waiting=4.0))) == {"q": QueueLoad(waiting=4.0)}
    served = Counters(waiting=4.0, served=10.0, busy=20.0)
    assert loads.observe(worker(served)) == {"q": QueueLoad(waiting=4.0, rate=2 * 0.5)}
    # A replica of two slots does 10 a second, and there is one.
    assert loads.observe(worker(served, score=10.0))["q"].rate == 10.0
    assert loads.observe(worker(served, score=10.0, slots=0))["q"].rate is None


def test_the_mean_of_a_queue_is_that_of_its_services() -> None:
    loads = queue_time.Loads({"q": {"embed": 1, "rank": 1}})
    assert loads.observe(worker(Counters()))["q"].mean == 1.0
    assert loads.observe(worker(Counters(arrived_inputs=7, mean=2.0)))["q"].mean == 2.0


def test_a_quick_service_on_the_same_queue_makes_the_slow_one_no_quicker() -> None:
    loads = queue_time.Loads({"q": {"slow": 1, "quick": 1}})
    both = snapshot.Worker(
        hostname="w1",
        tallies={"slow": Counters(arrived=98.0), "quick": Counters(arrived=2.0)},
        ready_slots={"slow": 1, "quick": 1},
        scores={"slow": snapshot.Score(value=2.0), "quick": snapshot.Score(value=900.0)},
    )
    assert loads.observe(both)["q"].rate == pytest.approx(2.0 / 0.98)
