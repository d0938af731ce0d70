from __future__ import annotations

import pytest

from gw_celery.policy import speed_bands
from gw_celery.policy.speed_bands import Band
from gw_celery.protocol.worker_record import ServiceRecord, WorkerRecord


@pytest.mark.parametrize(
    ("score", "best", "band"),
    [
        (100.0, 100.0, Band.QUICK),
        (95.0, 100.0, Band.QUICK),
        (100.0, None, Band.QUICK),
        (120.0, 100.0, Band.QUICK),
        (50.0, 100.0, Band.MIDDLE),
        (25.0, 100.0, Band.SLOW),
        (None, 100.0, Band.MIDDLE),
        (None, None, Band.MIDDLE),
        (0.0, 100.0, Band.MIDDLE),
    ],
)
def test_a_band_is_a_part_of_the_best_score(
    score: float | None, best: float | None, band: Band
) -> None:
    assert speed_bands.of(score, best) is band


def test_a_band_is_the_priority_of_a_consumer_and_the_middle_one_is_that_of_all_others() -> None:
    assert Band.SLOW < Band.MIDDLE == 0 < Band.QUICK


@pytest.mark.parametrize("border", [70.0, 35.0])
def test_noise_around_a_border_changes_nothing(border: float) -> None:
    above, below = speed_bands.of(border + 0.1, 100.0), speed_bands.of(border - 0.1, 100.0)
    assert above is not below
    for held in (above, below):
        for noise in (-5.0, -1.0, 1.0, 5.0):
            assert speed_bands.of(border * (1 + noise / 100), 100.0, held) is held


def test_what_is_clear_changes_a_band() -> None:
    assert speed_bands.of(78.0, 100.0, Band.MIDDLE) is Band.QUICK
    assert speed_bands.of(62.0, 100.0, Band.QUICK) is Band.MIDDLE
    assert speed_bands.of(39.0, 100.0, Band.SLOW) is Band.MIDDLE
    assert speed_bands.of(31.0, 100.0, Band.MIDDLE) is Band.SLOW
    assert speed_bands.of(10.0, 100.0, Band.QUICK) is Band.SLOW
    assert speed_bands.of(100.0, 100.0, Band.SLOW) is Band.QUICK


def other(**scores: float | None) -> WorkerRecord:
    services = {key: ServiceRecord(score=score) for key, score in scores.items()}
    return WorkerRecord(worker="other@host", services=services)


class Embed:
    """One service of a worker, beside one other worker that has the best score."""

    def __init__(self) -> None:
        self.bands = speed_bands.Bands(["embed"])

    def follow(self, score: float | None, best: float | None, now: float) -> str | None:
        """The band that it changes to; ``None`` for no change."""
        has_changed = self.bands.follow({"embed": score}, [other(embed=best)], now)
        return self.band if has_changed else None

    @property
    def band(self) -> str:
        return self.bands.names()["embed"]


def test_a_worker_is_in_the_middle_until_it_knows_its_score() -> None:
    embed = Embed()
    assert embed.follow(None, 100.0, 1.0) is None
    assert embed.band == "middle"
    assert embed.follow(20.0, 100.0, 1.5) == "slow"


def test_a_band_is_kept_for_a_while_but_for_the_first() -> None:
    embed = Embed()
    assert embed.follow(20.0, 20.0, 100.0) == "quick"
    assert embed.follow(20.0, 100.0, 101.0) == "slow"
    assert embed.follow(20.0, 20.0, 110.0) is None
    assert embed.follow(20.0, 20.0, 111.0) == "quick"


def test_a_first_score_in_the_middle_is_no_change() -> None:
    embed = Embed()
    assert embed.follow(50.0, 100.0, 100.0) is None
    assert embed.follow(72.0, 100.0, 101.0) is None, "sticky from the first on"


def test_scores_that_are_not_known_any_more_change_nothing() -> None:
    embed = Embed()
    embed.follow(20.0, 100.0, 100.0)
    assert embed.follow(None, 100.0, 200.0) is None
    assert embed.band == "slow"


@pytest.mark.parametrize(
    ("score", "others", "band"),
    [
        (40.0, [], "quick"),
        (None, [], "middle"),
        (None, [100.0], "middle"),
        (40.0, [None], "quick"),
        (25.0, [100.0, 50.0], "slow"),
        (50.0, [100.0, None], "middle"),
    ],
)
def test_the_best_score_is_that_of_all_workers_records(
    score: float | None, others: list[float | None], band: str
) -> None:
    bands = speed_bands.Bands(["embed"])
    records = [other(embed=each, unknown=1000.0) for each in others]
    assert bands.follow({"embed": score}, records, 100.0) is (band != "middle")
    assert bands.names() == {"embed": band}
