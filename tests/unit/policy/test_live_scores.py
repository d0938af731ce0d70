from __future__ import annotations

import dataclasses

import pytest

from gw_celery.policy import scores
from gw_celery.protocol import snapshot


class Traffic:
    """Looks once a second at replicas that serve a known rate."""

    def __init__(self, slots: int, *, measured: float | None = None) -> None:
        self.live = scores.LiveScore(slots)
        self.slots = slots
        self.counters = snapshot.Counters()
        self.now = 1000.0
        self.warnings = 0
        self.has_more = False
        self.live.measure(measured)

    def flow(
        self, seconds: int, rate: float, *, taken: float = 1.0, ready: int = 1, each: float = 1.0
    ) -> None:
        """Serve ``rate`` workload a second, in inputs of ``each``, with a share of slots taken."""
        for _ in range(seconds):
            self.now += 1.0
            served = self.counters.served + rate
            self.count(
                served=served,
                served_inputs=round(served / each),
                running_inputs=round(taken * self.slots * ready),
            )
            self.warnings += self.live.observe(
                self.now, self.counters, ready, has_more=self.has_more
            )

    def count(self, **changed: float) -> None:
        self.counters = dataclasses.replace(self.counters, **changed)  # type: ignore[arg-type]


def test_a_service_without_a_benchmark_has_no_score_until_it_is_full_for_a_while() -> None:
    traffic = Traffic(10)
    traffic.flow(60, 30.0, taken=0.5)
    assert traffic.live.value is None
    traffic.flow(30, 50.0)
    assert traffic.live.value == pytest.approx(50.0, rel=0.01)
    assert traffic.live.drift is None


def test_full_replicas_correct_a_wrong_score() -> None:
    traffic = Traffic(10, measured=1000.0)
    traffic.flow(20, 100.0)
    first = traffic.live.value
    assert first is not None
    assert 100.0 < first < 1000.0
    traffic.flow(300, 100.0)
    assert traffic.live.value == pytest.approx(100.0, rel=0.01)


def test_replicas_that_have_slots_left_say_nothing_of_what_they_can_do() -> None:
    traffic = Traffic(10, measured=100.0)
    traffic.flow(300, 20.0, taken=0.8)
    assert traffic.live.value == 100.0


def test_the_rate_is_that_of_one_replica() -> None:
    traffic = Traffic(10)
    traffic.flow(30, 200.0, ready=4)
    assert traffic.live.value == pytest.approx(50.0, rel=0.01)


def test_a_time_in_which_replicas_come_or_go_is_not_counted() -> None:
    traffic = Traffic(10, measured=100.0)
    for ready in (1, 2) * 20:
        traffic.flow(5, 500.0, ready=ready)
    assert traffic.live.value == 100.0


def test_moments_between_two_inputs_do_not_keep_a_replica_from_being_full() -> None:
    traffic = Traffic(10)
    for _ in range(20):
        traffic.flow(9, 50.0)
        traffic.flow(1, 50.0, taken=0.7)
    assert traffic.live.value == pytest.approx(50.0, rel=0.01)


def test_what_waits_in_the_worker_shows_that_no_slot_is_free() -> None:
    traffic = Traffic(10)
    traffic.count(waiting_inputs=3)
    traffic.flow(30, 50.0, taken=0.6)
    assert traffic.live.value == pytest.approx(50.0, rel=0.01)


def test_what_waits_in_the_broker_shows_it_too() -> None:
    traffic = Traffic(10)
    traffic.has_more = True
    traffic.flow(30, 50.0, taken=0.4)
    assert traffic.live.value == pytest.approx(50.0, rel=0.01)


def test_long_inputs_are_looked_at_for_longer() -> None:
    traffic = Traffic(4, measured=1000.0)
    traffic.flow(30, 0.1, each=1.0)  # one in ten seconds: each slot's first has not ended
    assert traffic.live.value == 1000.0
    traffic.flow(120, 0.1, each=1.0)
    assert traffic.live.value is not None
    assert traffic.live.value < 1000.0


def test_a_drift_of_30_percent_is_told_once() -> None:
    traffic = Traffic(10, measured=100.0)
    traffic.flow(600, 75.0)
    assert traffic.warnings == 0
    assert traffic.live.drift == pytest.approx(-0.25, abs=0.01)
    traffic.flow(600, 60.0)
    assert traffic.warnings == 1
    traffic.flow(600, 60.0)
    assert traffic.warnings == 1


def test_a_much_different_measure_ends_what_was_learnt_before_it() -> None:
    traffic = Traffic(10, measured=100.0)
    traffic.flow(600, 60.0)
    traffic.live.measure(110.0)
    assert traffic.live.value == pytest.approx(60.0, rel=0.01), "the same code, measured again"
    traffic.live.measure(300.0)
    assert traffic.live.value == 300.0
    traffic.flow(600, 60.0)
    assert traffic.warnings == 2


def test_nothing_served_teaches_nothing() -> None:
    traffic = Traffic(1, measured=5.0)
    traffic.flow(2000, 0.0)
    assert traffic.live.value == 5.0


def test_inputs_that_raise_at_once_make_no_replica_quick() -> None:
    traffic = Traffic(10, measured=100.0)
    for _ in range(60):
        traffic.count(failed=traffic.counters.failed + 40.0)
        traffic.flow(1, 90.0)
    assert traffic.live.value == pytest.approx(50.0, rel=0.2)
    for failed in (900.0, 850.0):
        for _ in range(60):
            traffic.count(failed=traffic.counters.failed + failed)
            traffic.flow(1, 900.0)
        assert traffic.live.value == pytest.approx(50.0, rel=0.2), "most fail: that teaches nothing"


def test_what_was_served_long_ago_is_forgotten_for_what_was_measured() -> None:
    traffic = Traffic(10, measured=100.0)
    traffic.flow(60, 5.0)
    assert traffic.live.value == pytest.approx(5.0, rel=0.1), "it was slow"
    for taken, value in ((0.2, 5.0), (1.0, 5.0), (0.2, 5.0)):
        traffic.flow(300, 5.0, taken=taken)
        assert traffic.live.value == pytest.approx(value, rel=0.1), "so it was minutes ago"
    traffic.flow(400, 5.0, taken=0.2)
    assert traffic.live.value == 100.0
    assert traffic.live.drift is None


def test_inputs_that_are_refused_make_no_replica_slow() -> None:
    traffic = Traffic(4, measured=20.0)
    for second in range(1, 61):
        is_late = second % 30 > 12  # after a burst all that waits is late for a while
        served = 40 if is_late else 20
        tallied = traffic.counters
        traffic.count(
            refused=tallied.refused + (40.0 if is_late else 0.0),
            failed=tallied.failed + (40.0 if is_late else 0.0),
            busy=tallied.busy + (0.0 if is_late else 4.0),
            waiting_inputs=50,
        )
        traffic.flow(1, float(served))
    assert traffic.live.value == pytest.approx(20.0)


def test_slots_that_are_at_work_teach_also_while_others_are_refused() -> None:
    traffic = Traffic(4, measured=20.0)
    for _ in range(300):
        tallied = traffic.counters
        traffic.count(
            refused=tallied.refused + 3.0,
            failed=tallied.failed + 3.0,
            busy=tallied.busy + 3.9,
            waiting_inputs=50,
        )
        traffic.flow(1, 13.0)
    assert traffic.live.value == pytest.approx(10.0, rel=0.01)


def test_a_score_that_is_too_high_comes_down_also_where_most_is_refused() -> None:
    traffic = Traffic(4, measured=300.0)
    for _ in range(300):
        tallied = traffic.counters
        traffic.count(
            refused=tallied.refused + 200.0,
            failed=tallied.failed + 200.0,
            busy=tallied.busy + 3.9,
            waiting_inputs=50,
        )
        traffic.flow(1, 300.0)
    assert traffic.live.value == pytest.approx(100.0, rel=0.01)


def test_what_full_replicas_serve_slowly_is_not_forgotten_between_two_lessons() -> None:
    traffic, seen = Traffic(1, measured=100.0), []
    for _ in range(5000):
        traffic.flow(1, 10.0, each=3500.0)
        seen.append(traffic.live.value)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] is not None
    assert seen[-1] < 12.0


def test_no_replica_teaches_nothing() -> None:
    traffic = Traffic(1)
    traffic.flow(100, 5.0, ready=0)
    assert traffic.live.value is None
