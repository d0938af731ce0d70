"""Who may declare others lost: a table of beats."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gw_celery.cluster import liveness

TTL = 15.0


def steady(seconds: int, start: float = 100.0, shift: float = 1e9) -> Iterator[tuple[float, float]]:
    """A beat a second, by the own clock and by Redis's."""
    for second in range(seconds):
        yield start + second, start + second + shift


def judged(*beats: tuple[float, float]) -> bool:
    trust = liveness.Trust(TTL)
    return [trust.beat(own, server) for own, server in beats][-1]


@pytest.mark.parametrize(
    ("beats", "is_trusted"),
    [
        ([*steady(10)], False),
        ([*steady(16)], False),
        ([*steady(17)], True),
        # A gap of a third of the ttl, as this worker was frozen or cut off.
        ([*steady(17), *steady(1, 122.5)], False),
        ([*steady(17), *steady(1, 121.0)], True),
        ([*steady(17), *steady(17, 130.0)], True),
        # Redis's clock was set, forwards or back: the beats of others are old by it, and are not.
        ([*steady(17), *steady(1, 117.0, 1e9 + 3600)], False),
        ([*steady(17), *steady(1, 117.0, 1e9 - 3600)], False),
        ([*steady(17), *steady(17, 117.0, 1e9 + 3600)], True),
        # It is set little by little.
        ([(100.0 + n, 1e9 + 1.2 * n) for n in range(17)], False),
    ],
)
def test_a_worker_trusts_itself_after_a_whole_ttl_of_beats(
    beats: list[tuple[float, float]], is_trusted: bool
) -> None:
    assert judged(*beats) is is_trusted


def test_the_clock_goes_on() -> None:
    assert liveness.now() <= liveness.now()
