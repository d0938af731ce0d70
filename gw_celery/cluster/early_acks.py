"""Inputs that were acknowledged as they began: the broker has forgotten them when a worker is lost.

The replica records such an input in Redis while it runs. What a lost worker was running is taken
over one by one, each by one worker alone, before its failure is stored: if that worker is lost in
turn, its successor finds the input with its records.
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Mapping
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.app.task import Context

from gw_celery import background_thread, codec
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: What Celery reads of a request when it stores a failure and tells the callers that wait for it.
_OF_REQUEST = (
    *("id", "task", "root_id", "parent_id", "group", "group_index", "ignore_result"),
    *("correlation_id", "reply_to", "retries", "stamps", "stamped_headers"),
)
_OF_BODY = ("errbacks", "chord", "chain")
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


def records_key(backend: Any, start: str) -> str:
    """Return the key of a hash beside the results: what a worker acknowledged early.

    By the number of the input; what was taken over is ``<start of the lost worker>/<number>``.

    Args:
        start: of the worker, which has more incarnations when it was taken for lost.
    """
    return f"{find.results_prefix(backend)}gw:early:{start}"


def start_of(incarnation: str) -> str:
    return incarnation.rpartition(".")[0]


def write(request: Mapping[str, Any], embed: Any) -> bytes:
    """Return the record of an input: who waits for it, not what it was called with.

    Raises:
        SerializationError: for callbacks that gw-json does not know.
    """
    embedded = embed if isinstance(embed, Mapping) else {}
    kept = {name: request.get(name) for name in _OF_REQUEST}
    kept |= {name: embedded.get(name) for name in _OF_BODY}
    return codec.dumps(kept).encode()


def read(record: bytes) -> dict[str, Any]:
    """Return what ``write`` was given.

    Raises:
        ValueError: for anything else.
    """
    kept = codec.loads(record)
    if not isinstance(kept, dict) or not isinstance(kept.get("id"), str):
        raise ValueError(f"not the record of an input: {record[:100]!r}")
    return kept


class LostInputs(background_thread.BackgroundThread):
    """Stores the failures, in a thread of its own: a result backend that hangs stops no beat.

    Args:
        app: the Celery app; its result backend is Redis.
        start: this worker's, by which its own records are kept; see ``membership``.
    """

    def __init__(self, app: Any, start: str) -> None:
        super().__init__(
            "gw-lost-inputs", "inputs of lost workers cannot be answered", period=math.inf
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
        return bool(backend.client.exists(records_key(backend, self._own)))

    def run_round(self) -> None:
        self.period = _AGAIN  # unless all goes well
        self.leave()
        lost = list(self._lost)
        for incarnation in lost:
            if not self._lost[incarnation]:
                self._take_over(start_of(incarnation))
                self._lost[incarnation] = True
        if lost and not self._answer_all():
            return
        for incarnation in lost:
            del self._lost[incarnation]
            self.answered.append(incarnation)
        self.period = math.inf

    def leave(self) -> None:
        backend, ended = self._app.backend, list(self._ended)
        if ended:
            backend.client.hdel(records_key(backend, self._own), *ended)
        for _ in ended:
            self._ended.popleft()

    def _take_over(self, lost: str) -> None:
        backend = self._app.backend
        keys = [records_key(backend, start) for start in (lost, self._own)]
        numbers = [number.decode() for number in backend.client.hkeys(keys[0])]
        for number in numbers:
            # One that the lost worker had taken over is still of the worker that ran it.
            taken = number if "/" in number else f"{lost}/{number}"
            backend.client.eval(_TAKE_OVER, 2, *keys, number, taken)
        if numbers:
            logger.error(
                "worker %s is lost with %d acknowledged inputs: each is answered as failed",
                *(lost.rpartition(":")[0], len(numbers)),
            )

    def _answer_all(self) -> bool:
        """Store the failure of everything that was taken over; whether nothing is left."""
        backend = self._app.backend
        mine = records_key(backend, self._own)
        is_done = True
        for number, record in backend.client.hgetall(mine).items():
            lost, is_taken_over, _ = number.decode().rpartition("/")
            if not is_taken_over:
                continue
            try:
                self._answer(backend, record, lost.rpartition(":")[0])
            except ValueError as exc:
                logger.error("the unreadable record %s is dropped: %s", number.decode(), exc)
            except Exception:
                logger.exception(
                    "the failure of lost input %s could not be stored; tried again", number.decode()
                )
                is_done = False
                continue
            backend.client.hdel(mine, number)
        return is_done

    def _answer(self, backend: Any, record: bytes, lost: str) -> None:
        """Store the failure of one input that ran on the node ``lost``.

        Raises:
            ValueError: for what is no record.
        """
        kept = read(record)
        task_id, name = kept["id"], kept["task"]
        if backend.get_task_meta(task_id, cache=False)["status"] in backend.READY_STATES:
            return  # it ended in the instant in which its worker was killed
        exc = WorkerLostError(
            f"{name}[{task_id}] was running on {lost}, which was killed or could not reach Redis, "
            f"and it had been acknowledged: send it again. With acks_late=True the broker gives "
            f"such an input to another worker"
        )
        # As Celery's request decides it.
        task, ignores = self._app.tasks.get(name), kept["ignore_result"]
        if ignores is None:
            ignores = getattr(task, "ignore_result", False)
        backend.mark_as_failure(
            task_id,
            exc,
            request=Context({**kept, "delivery_info": {}}),
            store_result=not ignores or bool(getattr(task, "store_errors_even_if_ignored", False)),
        )
        logger.error("the failure of a lost input is stored: %s", exc)
