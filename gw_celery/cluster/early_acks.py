"""Failures for early acknowledged inputs of a lost worker, which the broker has forgotten.

The child records such an input in Redis while it runs. One worker's parent takes over each record
of a lost worker, and then stores the failure. If this worker is lost in turn, another one finds the
input among its records.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.app.task import Context

from gw_celery import codec
from gw_celery.transport import find

logger = logging.getLogger(__name__)

#: The attributes of a request that Celery reads to store a failure and notify callers.
_OF_REQUEST = (
    *("id", "task", "root_id", "parent_id", "group", "group_index", "ignore_result"),
    *("correlation_id", "reply_to", "retries", "stamps", "stamped_headers"),
)
_OF_BODY = ("errbacks", "chord", "chain")
#: Maximum number of ended inputs that wait for the thread.
_MOST_ENDED = 10_000

#: Moves one record from one worker to another, atomically.
_TAKE_OVER = """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[2], record)
end
"""


def records_key(backend: Any, start: str) -> str:
    """Return the key of the hash of a worker's records, beside the results.

    Its fields are the numbers of inputs; a taken over record has
    ``<start of the lost worker>/<number>``.

    Args:
        backend: the Redis result backend.
        start: the start id of the worker, which stays the same in all its incarnations.
    """
    return f"{find.results_prefix(backend)}gw:early:{start}"


def start_of(incarnation: str) -> str:
    return incarnation.rpartition(".")[0]


def write(request: Mapping[str, Any], embed: Any) -> bytes:
    """Return the record of an input: its callers and callbacks, without its arguments.

    Raises:
        SerializationError: if gw-json does not support a callback.
    """
    embedded = embed if isinstance(embed, Mapping) else {}
    kept = {name: request.get(name) for name in _OF_REQUEST}
    kept |= {name: embedded.get(name) for name in _OF_BODY}
    return codec.dumps(kept).encode()


def read(record: bytes) -> dict[str, Any]:
    """Return the content of a record.

    Raises:
        ValueError: if it is not a record.
    """
    kept = codec.loads(record)
    names = ("id", "task")
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name), str) for name in names):
        raise ValueError(f"not the record of an input: {record[:100]!r}")
    return kept


class EarlyAcks:
    """The records of one worker, and of the lost workers that it answers for.

    Args:
        app: the Celery app, with a Redis result backend.
        start: start id of this worker, the key of its own records; see ``membership``.
    """

    def __init__(self, app: Any, start: str) -> None:
        self._app = app
        self._own = start
        self._ended: collections.deque[int] = collections.deque(maxlen=_MOST_ENDED)

    def forget(self, numbers: list[int]) -> None:
        """Schedule the removal of records of inputs that Celery has answered."""
        self._ended.extend(numbers)

    def has_own(self) -> bool:
        backend = self._app.backend
        return bool(backend.client.exists(records_key(backend, self._own)))

    def remove_ended(self) -> None:
        backend, ended = self._app.backend, list(self._ended)
        if ended and find.fields(backend.client, key := records_key(backend, self._own)):
            backend.client.hdel(key, *ended)
        for _ in ended:
            self._ended.popleft()

    def take_over(self, lost: str) -> None:
        """Move the records of a lost worker to this one; ``lost`` is its start id."""
        backend = self._app.backend
        keys = [records_key(backend, start) for start in (lost, self._own)]
        numbers = find.fields(backend.client, keys[0])
        if numbers:
            find.remove_foreign(backend.client, keys[1], "hash")
        for number in numbers:
            # An input that the lost worker had taken over keeps the name of the worker that ran it.
            taken = number if b"/" in number else f"{lost}/".encode() + number
            backend.client.eval(_TAKE_OVER, 2, *keys, number, taken)
        if numbers:
            logger.error(
                "worker %s is lost with %d acknowledged inputs: each is answered as failed",
                *(lost.rpartition(":")[0], len(numbers)),
            )

    def answer_all(self) -> bool:
        """Store the failures of all inputs that were taken over; return whether none is left."""
        backend = self._app.backend
        mine = records_key(backend, self._own)
        is_done = True
        for number in find.fields(backend.client, mine):
            name = number.decode(errors="replace")
            lost, is_taken_over, _ = name.rpartition("/")
            record = backend.client.hget(mine, number) if is_taken_over else None
            if record is None:
                continue
            try:
                self._answer(backend, record, lost.rpartition(":")[0])
            except ValueError as exc:
                logger.error("the unreadable record %s is dropped: %s", name, exc)
            except Exception:
                logger.exception(
                    "the failure of lost input %s could not be stored; tried again", name
                )
                is_done = False
                continue
            backend.client.hdel(mine, number)
        return is_done

    def _answer(self, backend: Any, record: bytes, lost: str) -> None:
        """Store the failure of one input that ran on the node ``lost``.

        Raises:
            ValueError: if ``record`` is not a record.
        """
        kept = read(record)
        task_id, name = kept["id"], kept["task"]
        if backend.get_task_meta(task_id, cache=False)["status"] in backend.READY_STATES:
            return  # it ended just before its worker was killed
        exc = WorkerLostError(
            f"{name}[{task_id}] was running on {lost}, which was killed or could not reach Redis, "
            f"and it had been acknowledged: send it again. With acks_late=True the broker gives "
            f"such an input to another worker"
        )
        # The same rule as in Celery's request.
        task, ignores = self._app.tasks.get(name), kept.get("ignore_result")
        if ignores is None:
            ignores = getattr(task, "ignore_result", False)
        backend.mark_as_failure(
            task_id,
            exc,
            request=Context({**kept, "delivery_info": {}}),
            store_result=not ignores or bool(getattr(task, "store_errors_even_if_ignored", False)),
        )
        logger.error("the failure of a lost input is stored: %s", exc)
