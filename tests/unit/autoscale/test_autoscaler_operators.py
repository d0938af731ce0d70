"""What operators tell the autoscaler: sizes and bounds."""

from __future__ import annotations

import pytest

from gw_celery import errors
from tests.unit.autoscale.handmade import Scaled, other


def test_less_than_no_replica_is_refused(scaled: Scaled) -> None:
    with pytest.raises(errors.ConfigurationError, match="min from 0 to max"):
        scaled.scaler.update(max=20, min=-5)


def test_an_operator_takes_away_what_a_worker_kept_of_another(scaled: Scaled) -> None:
    scaled.queued = 390
    scaled.peers = ()
    scaled.after(1)
    scaled.peers = (other("gpu@two", replicas=2, least=1),)
    scaled.after(2)
    scaled.scaler.force_scale_down(10)
    assert scaled.after(2) == 2


def test_bounds_are_slots_rounded_up_to_replicas(scaled: Scaled) -> None:
    assert scaled.scaler.update(max=11, min=6) == (15, 10)
    assert scaled.pool.desired == 2
    assert scaled.scaler.update(max=10) == (10, 10)
    scaled.queued = 100_000
    assert scaled.after(1) == 2


def test_less_than_there_are_are_drained_at_once(scaled: Scaled) -> None:
    scaled.queued = 100_000
    scaled.after(1)
    scaled.scaler.update(max=5)
    assert scaled.pool.desired == 1


@pytest.mark.parametrize("bounds", [{"max": 3, "min": 8}, {"min": 21}, {"max": 0, "min": 0}])
def test_bounds_that_contradict_each_other_are_refused(
    scaled: Scaled, bounds: dict[str, int]
) -> None:
    with pytest.raises(errors.ConfigurationError, match="give both"):
        scaled.scaler.update(**bounds)
    assert (scaled.scaler.max_concurrency, scaled.scaler.min_concurrency) == (20, 5)


def test_an_operator_resizes_it_at_once_and_beyond_its_bounds(scaled: Scaled) -> None:
    scaled.scaler.force_scale_up(5)
    assert scaled.pool.desired == 2
    assert scaled.after(60) == 2
    assert scaled.after(1500) == 1
    scaled.scaler.force_scale_up(23)
    assert (scaled.pool.desired, scaled.scaler.max_concurrency) == (6, 30)
    scaled.scaler.force_scale_down(30)
    assert (scaled.pool.desired, scaled.scaler.min_concurrency) == (0, 0)
    scaled.queued = 1
    assert scaled.after(1) == 1


def test_what_an_operator_takes_away_stays_away_while_it_drains(scaled: Scaled) -> None:
    scaled.queued = 290
    scaled.after(1)
    scaled.queued = 0
    assert scaled.after(5) == 3
    scaled.scaler.force_scale_down(10)
    scaled.shows("ready", "draining", "draining")
    assert scaled.after(5) == 1
