"""Answers for workers that were lost: the broker forgot what they had acknowledged early.

What a lost worker was running is taken over one by one, each by one worker alone, before its
failure is stored: if that worker is lost in turn, its successor finds the input with its records.
"""

from __future__ import annotations

import collections
import logging
import math
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.app.task import Context
from celery.backends.redis import RedisBackend

from gw_celery import background_thread
from gw_celery.cluster import early_acks

logger = logging.getLogger(__name__)

#: Ends of inputs that may wait for the thread.
_MOST_ENDED = 10_000
#: Seconds after which what could not be stored is tried again.
_AGAIN = 5.0

#: One record goes from one worker to another, or nothing happens.
_TAKE_OVER = """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[2], record)
end
"""


class LostInputs(background_thread.BackgroundThread):
    """Stores the failures, in a thread of its own: a result backend that hangs stops no beat.

    Args:
        app: the Celery app; its result backend is Redis.
        start: this worker's, by which its own records are kept; see ``membership``.
    """

    def __init__(self, app: Any, start: str) -> None:
        super().__init__(
            "gw-lost-inputs", "the inputs of lost workers cannot be answered", period=math.inf
        )
        self._app = app
        self._own = start
        #: Whether its inputs were taken over. Once: it may wake up, and record others there.
        self._lost: dict[str, bool] = {}
        self._ended: collections.deque[int] = collections.deque(maxlen=_MOST_ENDED)
        #: Lost workers that left nothing, or of whom nothing is left.
        self.answered: collections.deque[str] = collections.deque()

    def take(self, incarnation: str) -> None:
        """Answer for a lost worker, in the thread."""
        self._lost.setdefault(incarnation, False)
        self.start()
        self.wake()

    def forget(self, numbers: list[int]) -> None:
        """Remove the records of inputs whose replica died, and which Celery has answered."""
        self._ended.extend(numbers)
        self.start()
        self.wake()

    def has_own(self) -> bool:
        """Whether inputs of this worker are on record."""
        backend = self._app.backend
        return bool(backend.client.exists(early_acks.records_key(backend, self._own)))

    def run_round(self) -> None:
        self.period = _AGAIN  # unless all goes well
        backend = self._app.backend
        self._remove_ended(backend)
        lost = list(self._lost)
        for incarnation in lost:
            if not self._lost[incarnation]:
                self._take_over(backend, incarnation)
                self._lost[incarnation] = True
        if lost and not self._answer_all(backend):
            return
        for incarnation in lost:
            del self._lost[incarnation]
            self.answered.append(incarnation)
        self.period = math.inf

    def leave(self) -> None:
        self._remove_ended(self._app.backend)

    def _remove_ended(self, backend: Any) -> None:
        ended = list(self._ended)
        if ended:
            backend.client.hdel(early_acks.records_key(backend, self._own), *ended)
        for _ in ended:
            self._ended.popleft()

    def _take_over(self, backend: Any, lost: str) -> None:
        start = early_acks.start_of(lost)
        keys = [early_acks.records_key(backend, owner) for owner in (start, self._own)]
        numbers = [number.decode() for number in backend.client.hkeys(keys[0])]
        for number in numbers:
            backend.client.eval(_TAKE_OVER, 2, *keys, number, early_acks.taken_over(start, number))
        if numbers:
            logger.error(
                "worker %s was lost: it left %d inputs that it had acknowledged",
                early_acks.node(start),
                len(numbers),
            )

    def _answer_all(self, backend: Any) -> bool:
        """Store the failure of everything that was taken over; whether nothing is left."""
        mine = early_acks.records_key(backend, self._own)
        is_done = True
        for number, record in backend.client.hgetall(mine).items():
            start = early_acks.lost_worker(number.decode())
            if start is None:
                continue
            try:
                self._answer(backend, record, early_acks.node(start))
            except ValueError as exc:
                logger.error("the record %s cannot be read and is dropped: %s", number, exc)
            except Exception:
                logger.exception("the failure of a lost input could not be stored; tried again")
                is_done = False
                continue
            backend.client.hdel(mine, number)
        return is_done

    def _answer(self, backend: Any, record: bytes, lost: str) -> None:
        kept = early_acks.read(record)
        task_id, name = kept["id"], kept["task"]
        if backend.get_task_meta(task_id, cache=False)["status"] in backend.READY_STATES:
            return  # it ended in the instant in which its worker was killed
        exc = WorkerLostError(
            f"{name}[{task_id}] was running on {lost}, which was killed or lost its connection to "
            f"Redis, and had been acknowledged: send it again; acks_late=True would have given it "
            f"to another worker"
        )
        request = Context({**kept, "delivery_info": {}})
        backend.mark_as_failure(task_id, exc, request=request, store_result=self._stores(kept))
        logger.error("%s", exc)

    def _stores(self, kept: dict[str, Any]) -> bool:
        """As Celery's request decides it."""
        task = self._app.tasks.get(kept["task"])
        ignores = kept["ignore_result"]
        if ignores is None:
            ignores = getattr(task, "ignore_result", False)
        return not ignores or bool(getattr(task, "store_errors_even_if_ignored", False))


def of(app: Any, start: str) -> LostInputs | None:
    """Return what answers for lost workers; ``None`` where results are not in Redis.

    Backends derived from Redis (Sentinel) write results without the pipelines that records need.
    """
    return LostInputs(app, start) if type(app.backend) is RedisBackend else None
