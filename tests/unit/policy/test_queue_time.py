"""How long an input would wait, from what workers tell each other."""

from __future__ import annotations

import pytest

from gw_celery.policy import queue_time
from gw_celery.protocol import snapshot
from gw_celery.protocol.snapshot import Counters
from gw_celery.protocol.worker_record import QueueLoad


@pytest.mark.parametrize(
    ("queued", "loads", "wait"),
    [
        pytest.param(30.0, [QueueLoad(waiting=10.0, rate=4.0)], 10.0, id="ahead over its rate"),
        pytest.param(
            26.0,
            [QueueLoad(waiting=3.0, rate=2.0), QueueLoad(waiting=1.0), QueueLoad(rate=1.0)],
            10.0,
            id="workers add up, and one that has served nothing adds no rate",
        ),
        pytest.param(0.0, [QueueLoad()], 0.0, id="an empty queue, with any worker"),
        pytest.param(0.0, [QueueLoad(rate=0.1)], 0.0, id="an empty queue of a slow service"),
        pytest.param(10.0, [QueueLoad()], None, id="nothing is known of a rate"),
        pytest.param(10.0, [QueueLoad(rate=0.0)], None, id="nothing serves"),
    ],
)
def test_the_wait_is_what_is_ahead_over_what_is_done_in_a_second(
    queued: float, loads: list[QueueLoad], wait: float | None
) -> None:
    assert queue_time.estimate(queued, loads) == wait


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
    recent = queue_time.Recent()
    for _ in range(300):
        recent.observe(Counters(arrived=10.0))
    assert recent.came < 0.1
    recent.observe(Counters(arrived=15.0))
    assert recent.came == pytest.approx(5.0, rel=0.02)


def test_the_pace_is_that_of_a_taken_slot_and_idleness_does_not_lower_it() -> None:
    recent = queue_time.Recent()
    recent.observe(Counters())
    assert recent.pace is None
    for _ in range(100_000):
        recent.observe(Counters(served=10.0, busy=2.0))
    assert recent.pace == 5.0


def test_a_service_that_becomes_slower_is_found_out_within_minutes() -> None:
    recent, served = queue_time.Recent(), 0.0
    for second in range(1, 721):
        served += 10.0 if second <= 600 else 1.0
        recent.observe(Counters(served=served, busy=float(second)))
    assert recent.pace is not None
    assert recent.pace < 2.0


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
