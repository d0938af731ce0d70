"""When this worker last heard each tick of beat, and whether beat has fallen silent."""

from __future__ import annotations

import enum

#: Periods without a tick after which there seems to be no beat.
_MISSED = 3


class Kind(enum.StrEnum):
    """What a tick is for."""

    PROBE = "probe"
    BENCHMARK = "benchmark"


class Ticks:
    """The ticks that one worker has heard; ``now`` is the clock of the caller."""

    def __init__(self) -> None:
        self._heard: dict[Kind, float] = {}

    def heard(self, kind: Kind, now: float) -> None:
        """A tick of beat has come."""
        self._heard[kind] = now

    def ages(self, now: float) -> dict[str, float]:
        """Seconds since the last tick of each kind that has come."""
        return {kind.value: now - at for kind, at in self._heard.items()}

    def is_silent(self, kind: Kind, now: float, period: float | None) -> bool:
        """Whether a worker has to act by itself: no tick in three periods, or none ever.

        Without a ``period`` beat sends none.
        """
        last = self._heard.get(kind)
        return last is None or period is None or now - last > _MISSED * period
