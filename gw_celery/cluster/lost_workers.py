"""What the worker that declares another one lost does for it: in a thread of the worker's parent.

The messages that the lost worker held go back to their queues, and its early acknowledged inputs
are answered as failed. If this worker is lost in turn, another one continues.
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Mapping
from typing import Any

from gw_celery import background_thread
from gw_celery.cluster import early_acks, fence
from gw_celery.transport import find, holds

logger = logging.getLogger(__name__)

#: Seconds for which a tombstone is kept.
TOMBSTONE = 7 * 86_400
#: Seconds before what failed is tried again.
_AGAIN = 5.0


class LostWorkers(background_thread.BackgroundThread):
    """Does this in a separate thread, so that a slow server delays no heartbeat.

    Args:
        app: the Celery app.
        start: start id of this worker.
        timeout: seconds that each answer of the broker may take.
    """

    def __init__(self, app: Any, start: str, timeout: float) -> None:
        super().__init__(
            "gw-lost-workers", "the inputs of lost workers cannot be given back", period=math.inf
        )
        self._app = app
        self._broker = _broker(app, timeout)
        #: ``None`` with a result backend that lacks the pipelines that write the records.
        self.early: early_acks.EarlyAcks | None = None
        if fence.is_grouped(app.backend):
            self.early = early_acks.EarlyAcks(app, start)
        #: Lost worker -> whether its early acknowledged inputs were taken over; only once, because
        #: it may wake up.
        self._lost: dict[str, bool] = {}
        #: Lost workers of which nothing is left.
        self.answered: collections.deque[str] = collections.deque()

    def take(self, incarnation: str, *, goes_on: bool) -> None:
        """Answer for a lost worker, in the thread.

        Args:
            incarnation: its name.
            goes_on: whether it runs its early acknowledged inputs under its next name.
        """
        self._lost.setdefault(incarnation, goes_on)
        self.start()
        self.wake()

    def answer(self, lost: Mapping[str, bool]) -> None:
        """Answer for lost workers now, in the caller's thread; see ``take`` for each."""
        self._lost = {**lost, **self._lost}
        self.run_round()

    def forget(self, numbers: list[int]) -> None:
        """Remove the early records of inputs whose child died, because Celery has answered them."""
        if self.early is not None:
            self.early.forget(numbers)
            self.start()
            self.wake()

    def run_round(self) -> None:
        self.period = _AGAIN  # changed below after success
        self.leave()
        given, failure = [], None
        for incarnation in list(self._lost):
            try:
                self._give_back(incarnation)
                given.append(incarnation)
            except Exception as exc:
                failure = exc  # the other lost workers do not wait for this one
        is_answered = not self._lost or self.early is None or self.early.answer_all()
        for incarnation in given if is_answered else ():
            del self._lost[incarnation]
            self.answered.append(incarnation)
        if failure is not None:
            raise failure
        if is_answered:
            self.period = math.inf

    def leave(self) -> None:
        if self.early is not None:
            self.early.remove_ended()

    def _give_back(self, incarnation: str) -> None:
        fence.close_to(self._app, incarnation, TOMBSTONE)
        start = early_acks.start_of(incarnation)
        if self.early is not None and not self._lost[incarnation]:
            self.early.take_over(start)
        self._lost[incarnation] = True
        if self._broker is None:
            return
        try:
            count = reclaim(self._broker, incarnation)
        finally:
            self._broker.close()
        if count:
            logger.warning(
                "worker %s is lost with %d unfinished messages: they are back in their queues",
                *(start.rpartition(":")[0], count),
            )


def _broker(app: Any, timeout: float) -> find.BrokerRedis | None:
    shared = find.redis_of(app, timeout)
    return shared if isinstance(shared, find.BrokerRedis) else None


def reclaim(broker: find.BrokerRedis, incarnation: str) -> int:
    """Return the messages of a lost worker to their queues; return their number."""
    client, held_in = broker.client(), holds.key(broker.prefix, incarnation)
    return holds.give_back(client, held_in, holds.numbers_of(client, held_in), is_lost=True)
