"""Workers that share a queue, each with an autoscaler of its own, and the facts of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.autoscale.handmade import Scaled

#: Replicas that each of ten workers may have.
CAPACITIES = st.lists(st.integers(1, 6), min_size=10, max_size=10)


class Group:
    """Workers that decide one after the other, once a second, on the same clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capacities: Sequence[int]) -> None:
        self.workers = [
            Scaled(monkeypatch, name=f"gpu@{number}", most=most, least=0)
            for number, most in enumerate(capacities)
        ]
        self.now = 1000.0
        for one in self.workers:
            one.clock = lambda: self.now

    def after(self, seconds: int, queued: int) -> list[int]:
        """The replicas of each while so much waits, and all know what the others told."""
        for _ in range(seconds):
            self.now += 1.0
            known = [one.record for one in self.workers]
            for one in self.workers:
                one.queued = queued
                one.peers = tuple(told for told in known if told.worker != one.pool.hostname)
                one.scaler.maybe_scale()
        return [one.pool.desired for one in self.workers]

    @property
    def totals(self) -> set[int]:
        """What each of them says that they need together."""
        return {one.seen["total"] for one in self.workers}


@contextmanager
def group(capacities: Sequence[int]) -> Iterator[Group]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Group(monkeypatch, capacities)
        yield made
        for one in made.workers:
            one.app.close()


def has_its_part(parts: Sequence[int], capacities: Sequence[int]) -> bool:
    """Whether no worker has a replica that another, by capacity, should have (Webster's rule)."""
    last = [(part - 0.5) / most for part, most in zip(parts, capacities, strict=True) if part]
    following = [
        (part + 0.5) / most for part, most in zip(parts, capacities, strict=True) if part < most
    ]
    return max(last, default=0.0) <= min(following, default=1.0)


@settings(deadline=None, max_examples=25)
@example([1] * 9 + [2], 11)
@example([1] * 8 + [3, 1], 11)
@given(CAPACITIES, st.integers(2, 70))
def test_ten_workers_do_not_each_scale_for_the_whole_queue(
    capacities: list[int], needed: int
) -> None:
    wanted = min(needed, sum(capacities))
    # They have one each as they begin: less than the head-room over that is no reason for another.
    # Who sees one more, because a replica moves as they begin, takes that for what there is.
    enough = {10, 11} if wanted == 11 else {wanted}
    with group(capacities) as workers:
        # A replica does 10 a second, and what waits is to be done within 10 s.
        for seconds in (1, 1, 30):
            parts = workers.after(seconds, queued=100 * needed - 10)
            assert sum(parts) in workers.totals <= enough
            assert has_its_part(parts, capacities)
