from __future__ import annotations

import pytest

from gw_celery.pool.ticks import Kind, Ticks


@pytest.mark.parametrize(
    ("now", "period", "is_silent"),
    [(100.0, 10.0, False), (130.0, 10.0, False), (130.1, 10.0, True), (100.0, None, True)],
)
def test_beat_is_silent_after_three_periods_or_when_it_sends_nothing(
    now: float, period: float | None, is_silent: bool
) -> None:
    ticks = Ticks()
    ticks.heard(Kind.PROBE, 100.0)
    assert ticks.is_silent(Kind.PROBE, now, period) == is_silent


def test_a_tick_that_never_came_is_silence_for_each_kind_by_itself() -> None:
    ticks = Ticks()
    ticks.heard(Kind.BENCHMARK, 100.0)
    assert ticks.is_silent(Kind.PROBE, 100.0, 10.0)
    assert not ticks.is_silent(Kind.BENCHMARK, 100.0, 10.0)


def test_the_ages_are_those_of_what_has_come() -> None:
    ticks = Ticks()
    ticks.heard(Kind.PROBE, 100.0)
    ticks.heard(Kind.PROBE, 104.0)
    assert ticks.ages(106.5) == {"probe": 2.5}
