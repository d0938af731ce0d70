"""How quick a worker is among those that serve the same queue: in three coarse bands.

A broker that knows priorities of consumers gives an input to a quicker worker as long as that has a
free slot. Bands are coarse and sticky, because a change is a new subscription.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Collection, Iterable, Mapping

from gw_celery.protocol.worker_record import WorkerRecord

logger = logging.getLogger(__name__)

#: Part of the best score from which on a worker is QUICK, and below which it is SLOW.
_QUICK = 0.7
_SLOW = 0.35
#: How far beyond a border a score must be for a worker to change its band: measuring is noisy.
_STICKINESS = 0.1
#: Seconds that a worker stays in a band at least.
_RESIDENCE = 10.0


class Band(enum.IntEnum):
    """The value is RabbitMQ's ``x-priority``; a consumer that names none has 0."""

    SLOW = -1
    #: Also of a worker that does not know its score, as other programs that consume the queue.
    MIDDLE = 0
    QUICK = 1


def of(score: float | None, best: float | None, held: Band | None = None) -> Band:
    """Return the band of a worker by its score.

    Args:
        score: of this worker; ``None`` while it is not known.
        best: of all workers that are known; ``None`` while none is.
        held: the band that it is in, which it leaves only for a clear reason.
    """
    if score is None or score <= 0:
        return Band.MIDDLE
    part = score / max(score, best or 0.0)
    if held is None:
        return _by_borders(part, 1.0)
    # The borders above it are farther away, and so are those below it.
    stretch = 1.0 + _STICKINESS
    return min(max(held, _by_borders(part, stretch)), _by_borders(part, 1.0 / stretch))


def _by_borders(part: float, stretch: float) -> Band:
    if part >= _QUICK * stretch:
        return Band.QUICK
    return Band.MIDDLE if part >= _SLOW * stretch else Band.SLOW


class ServiceBand:
    """The band of one worker for one service, as time goes by.

    It is MIDDLE until the worker knows its score.
    """

    def __init__(self) -> None:
        self.band = Band.MIDDLE
        self._is_known = False
        self._since = -math.inf

    def follow(self, score: float | None, best: float | None, now: float) -> bool:
        """Look at the scores again; whether the band is another one now.

        A score that is not known any more, because no replica is there, changes nothing. The first
        band is not kept for long: the others may not have told their scores yet.
        """
        if score is None or best is None or now - self._since < _RESIDENCE:
            return False
        band = of(score, best, self.band if self._is_known else None)
        is_other = band is not self.band
        if is_other and self._is_known:
            self._since = now
        self.band, self._is_known = band, True
        return is_other


class Bands:
    """The bands of one worker.

    Args:
        services: the keys of its services.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._bands = {service: ServiceBand() for service in services}

    def follow(
        self, scores: Mapping[str, float | None], others: Collection[WorkerRecord], now: float
    ) -> bool:
        """Look at this worker's scores and those of the others; whether a band has changed."""
        has_changed = False
        for service, current in self._bands.items():
            score = scores.get(service)
            records = (other.services.get(service) for other in others)
            known = [score, *(record.score for record in records if record is not None)]
            best = max((each for each in known if each is not None), default=None)
            if current.follow(score, best, now):
                has_changed = True
                band = current.band.name.lower()
                logger.info("%s: this worker is %s beside the others", service, band)
        return has_changed

    def names(self) -> dict[str, str]:
        """The band of each service, by its name."""
        return {service: current.band.name.lower() for service, current in self._bands.items()}
