"""Which score is the best among the workers of a service, and when to say something about it.

Nobody is asked. A worker that is better than all that it has heard of claims so, after a while that
chance decides, unless another one has claimed as much by then. The holder of the best score repeats
it now and then, and soon when somebody claims less. So a thousand alike that start together say
about ten things between them, and one that joins says one thing and hears one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from gw_celery.protocol import untrusted

#: A score that is better by less is not news.
_NEWS = 1.1
#: Seconds within which a worker claims the best score: the more, the fewer say the same.
_HESITATION = 10.0
#: Seconds within which the holder answers a lower claim, and at least between two of its words.
_ANSWER = 2.0
_PAUSE = 5.0
#: Seconds that a score holds good, even when the holder's has changed: most changes are noise.
_CONSTANCY = 60.0
#: Seconds after which the holder repeats its score, and others forget it.
_RENEWAL = 600.0
_LIFETIME = 3 * _RENEWAL
#: Seconds after which a holder that has not answered a lower claim is gone.
_DOUBT = 30.0


@dataclasses.dataclass
class _Best:
    """What is known of one service."""

    score: float | None = None
    holder: str = ""
    #: When it was last heard, or said.
    at: float = 0.0
    #: When this worker will say its score, unless that is no news by then.
    speak_at: float | None = None
    #: The best of what was claimed below the holder's score, and when the first of it was.
    rival: float = 0.0
    rival_name: str = ""
    doubted_at: float | None = None

    def take(self, score: float, holder: str, now: float) -> None:
        self.score, self.holder, self.at = score, holder, now
        self.speak_at = self.doubted_at = None


class Claims:
    """The best scores that one worker knows of.

    Args:
        me: the name of this worker.
        services: the services that it serves; it keeps nothing of others.
        chance: a number from 0 to 1.
    """

    def __init__(self, me: str, services: Iterable[str], chance: Callable[[], float]) -> None:
        self._me = me
        self._known = {service: _Best() for service in services}
        self._chance = chance

    def best(self, service: str) -> float | None:
        """The best score of a service that is known, this worker's own left aside if unsaid."""
        return self._known[service].score

    def hear(self, worker: str, scores: Mapping[str, float], now: float) -> None:
        """Take in what another worker has said; what is no score is ignored."""
        for service, score in scores.items():
            known = self._known.get(service)
            if known is not None and worker != self._me and _is_score(score):
                self._weigh(known, worker, float(score), now)

    def due(self, scores: Mapping[str, float | None], now: float) -> dict[str, float]:
        """What this worker, with these scores, is to tell the others now."""
        return {
            service: score
            for service, known in self._known.items()
            if (score := scores.get(service)) is not None
            and _is_score(score)
            and self._is_due(known, score, now)
        }

    def _weigh(self, known: _Best, worker: str, score: float, now: float) -> None:
        """Follow one claim. Of equal scores the later name's counts, so that all agree."""
        is_holder = known.score is None or worker == known.holder
        if is_holder or (score, worker) > (known.score or 0.0, known.holder):
            known.take(score, worker, now)
        elif score * _NEWS < (known.score or 0.0):
            if known.holder == self._me:
                self._plan(known, max(now, known.at + _PAUSE), _ANSWER)
            else:
                _doubt(known, worker, score, now)

    def _is_due(self, known: _Best, score: float, now: float) -> bool:
        """Whether to say it, which is then taken as said."""
        self._forget(known, now)
        is_mine = known.holder == self._me
        if self._has_news(known, score, now):
            self._plan(known, now, 0.0 if is_mine else _HESITATION)
        elif not is_mine:
            known.speak_at = None
        if known.speak_at is None or now < known.speak_at:
            return False
        known.take(score, self._me, now)
        return True

    def _has_news(self, known: _Best, score: float, now: float) -> bool:
        if known.score is None:
            return True
        if known.holder != self._me:
            return score > known.score * _NEWS
        age = now - known.at
        is_other = not known.score / _NEWS <= score <= known.score * _NEWS
        return age >= _RENEWAL or (is_other and age >= _CONSTANCY)

    def _plan(self, known: _Best, start: float, span: float) -> None:
        if known.speak_at is None:
            known.speak_at = start + span * self._chance()

    def _forget(self, known: _Best, now: float) -> None:
        """Give up a holder that has not been heard for long, or did not answer a lower claim."""
        if known.score is None or known.holder == self._me:
            return
        if known.doubted_at is not None and now - known.doubted_at >= _DOUBT:
            known.take(known.rival, known.rival_name, now)
        elif now - known.at >= _LIFETIME:
            known.score, known.holder = None, ""


def _doubt(known: _Best, worker: str, score: float, now: float) -> None:
    if known.doubted_at is None:
        known.doubted_at, known.rival = now, 0.0
    if score > known.rival:
        known.rival, known.rival_name = score, worker


def _is_score(score: object) -> bool:
    return (untrusted.finite(score) or 0.0) > 0
