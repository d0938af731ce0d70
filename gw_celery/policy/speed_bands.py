"""The speed of a worker among those that serve the same queue, in three bands; in its parent.

A broker with consumer priorities gives an input to a faster worker while that has a free slot.
Bands are coarse and change slowly, because each change is a new subscription.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Collection, Iterable, Mapping

from gw_celery.protocol.worker_record import WorkerRecord

logger = logging.getLogger(__name__)

#: Shares of the best score: QUICK begins at the first, and SLOW is below the second.
_QUICK = 0.7
_SLOW = 0.35
#: Relative distance beyond a border that a change of band requires, because measuring is noisy.
_STICKINESS = 0.1
#: Minimum seconds in a band.
_RESIDENCE = 10.0


class Band(enum.IntEnum):
    """A speed band; its value is RabbitMQ's ``x-priority``, whose default is 0."""

    SLOW = -1
    #: Also for a worker without a score, and for other consumers of the queue.
    MIDDLE = 0
    QUICK = 1


def of(score: float | None, best: float | None, held: Band | None = None) -> Band:
    """Return the band of a worker.

    Args:
        score: the score of this worker; ``None`` if unknown.
        best: the best score of all known workers; ``None`` if unknown.
        held: its current band, which it keeps unless the score is clearly beyond a border.
    """
    if score is None or score <= 0:
        return Band.MIDDLE
    part = score / max(score, best or 0.0)
    if held is None:
        return _by_borders(part, 1.0)
    # Move both borders away from the current band.
    stretch = 1.0 + _STICKINESS
    return min(max(held, _by_borders(part, stretch)), _by_borders(part, 1.0 / stretch))


def _by_borders(part: float, stretch: float) -> Band:
    if part >= _QUICK * stretch:
        return Band.QUICK
    return Band.MIDDLE if part >= _SLOW * stretch else Band.SLOW


class Bands:
    """The bands of one worker; MIDDLE for a service whose score is unknown.

    Args:
        services: the keys of its services.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._bands = dict.fromkeys(services, Band.MIDDLE)
        #: Time of the last change of each service with a known score. The first band may change
        #: soon, because the others' scores may not be known yet.
        self._since: dict[str, float] = {}

    def follow(
        self, scores: Mapping[str, float | None], others: Collection[WorkerRecord], now: float
    ) -> bool:
        """Update the bands; return whether one has changed.

        Args:
            scores: scores of this worker by service; an unknown one changes nothing.
            others: the records of the other workers.
            now: the current time.
        """
        has_changed = False
        for service, held in self._bands.items():
            score = scores.get(service)
            since = self._since.get(service)
            if score is None or (since is not None and now - since < _RESIDENCE):
                continue
            records = (other.services.get(service) for other in others)
            best = max((record.score or 0.0 for record in records if record), default=None)
            band = of(score, best, None if since is None else held)
            if since is None:
                self._since[service] = -math.inf
            elif band is not held:
                self._since[service] = now
            if band is not held:
                self._bands[service] = band
                has_changed = True
                logger.info("%s: this worker is %s beside the others", service, band.name.lower())
        return has_changed

    def names(self) -> dict[str, str]:
        return {service: band.name.lower() for service, band in self._bands.items()}
