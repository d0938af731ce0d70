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


class Bands:
    """The bands of one worker; MIDDLE for a service until the worker knows its score.

    Args:
        services: the keys of its services.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._bands = dict.fromkeys(services, Band.MIDDLE)
        #: When those services got their bands whose scores are known; the first is not kept for
        #: long: the others may not have told their scores yet.
        self._since: dict[str, float] = {}

    def follow(
        self, scores: Mapping[str, float | None], others: Collection[WorkerRecord], now: float
    ) -> bool:
        """Look at this worker's scores and those of the others; whether a band has changed.

        A score that is not known any more, because no replica is there, changes nothing.
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
        """The band of each service, by its name."""
        return {service: band.name.lower() for service, band in self._bands.items()}
