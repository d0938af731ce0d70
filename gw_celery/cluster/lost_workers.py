"""Answers for workers that were killed: the broker forgot what they had acknowledged early.

Each worker has a key in Redis that expires unless a thread of the worker renews it, and looks for
those of others that have expired. What a lost worker was running is taken over one by one, each by
one worker alone, before its failure is stored: who is killed meanwhile is answered for in turn.
"""

from __future__ import annotations

import collections
import logging
import threading
import uuid
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.app.task import Context
from celery.backends.redis import RedisBackend

from gw_celery import conf
from gw_celery.cluster import early_acks
from gw_celery.pool import request as pool_request

logger = logging.getLogger(__name__)

#: Rounds in the life of a key.
_ROUNDS = 4
#: Seconds that the end of a worker waits for the thread.
_FAREWELL = 2.0
#: Ends of inputs that may wait for the thread.
_MOST_ENDED = 10_000

#: One record goes from one worker to another, or nothing happens.
_TAKE_OVER = """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[2], record)
end
"""
#: A worker without records is not looked at any more.
_STRIKE_OFF = """
if redis.call('EXISTS', KEYS[1]) == 0 and redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('SREM', KEYS[3], ARGV[1])
end
"""


class Janitor:
    """Shows that this worker lives, and answers for those that do not.

    Args:
        app: the Celery app; its result backend is Redis.
        hostname: the worker's node name.
        lifetime: seconds after which a worker without a sign of life may be lost.
    """

    def __init__(self, app: Any, hostname: str, lifetime: float) -> None:
        #: This worker's name in Redis: another one when it is started again.
        self.worker = f"{hostname}:{uuid.uuid4().hex}"
        self._app = app
        self._lifetime = lifetime
        self._watch = early_acks.Watch(lifetime / 2)
        self._ended: collections.deque[int] = collections.deque(maxlen=_MOST_ENDED)
        self._has_taken_over = False
        self._is_away = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gw-janitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def forget(self, numbers: list[int]) -> None:
        """Remove the records of inputs whose replica died, and which Celery has answered."""
        self._ended.extend(numbers)

    def close(self) -> None:
        """End the thread; what is still on record is left for other workers to find."""
        self._is_over.set()
        self._thread.join(_FAREWELL)

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._try(self._round)
            self._is_over.wait(self._lifetime / _ROUNDS)
        self._try(self._leave)

    def _try(self, what: Any) -> None:
        try:
            backend = self._app.backend
            what(backend, early_acks.Keys.of(backend))
            self._is_away = False
        except Exception as exc:
            if not self._is_away:  # once for an outage
                logger.warning(
                    "lost workers cannot be looked for, nor this one be seen to live: %r; tried "
                    "again every %.0f s",
                    exc,
                    self._lifetime / _ROUNDS,
                )
            self._is_away = True

    def _round(self, backend: Any, keys: early_acks.Keys) -> None:
        client = backend.client
        workers = self._show(client, keys)
        for lost in self._watch.lost(
            workers, self._beating(client, keys, workers), pool_request.now()
        ):
            self._take_over(client, keys, lost)
        if self._has_taken_over:
            self._has_taken_over = not self._answer_all(backend, keys)

    def _show(self, client: Any, keys: early_acks.Keys) -> list[str]:
        """Renew this worker's key; returns all workers but this one."""
        mine = keys.records(self.worker)
        with client.pipeline(transaction=False) as pipe:
            pipe.sadd(keys.workers, self.worker)
            pipe.set(keys.beat(self.worker), 1, px=int(self._lifetime * 1000))
            pipe.smembers(keys.workers)
            while self._ended:
                pipe.hdel(mine, str(self._ended.popleft()))
            _, _, members, *_ = pipe.execute()
        return [one.decode() for one in members if one.decode() != self.worker]

    def _beating(self, client: Any, keys: early_acks.Keys, workers: list[str]) -> list[str]:
        if not workers:
            return []
        answers = client.mget([keys.beat(one) for one in workers])
        return [one for one, beat in zip(workers, answers, strict=True) if beat is not None]

    def _take_over(self, client: Any, keys: early_acks.Keys, lost: str) -> None:
        theirs, mine = keys.records(lost), keys.records(self.worker)
        numbers = [number.decode() for number in client.hkeys(theirs)]
        for number in numbers:
            client.eval(_TAKE_OVER, 2, theirs, mine, number, early_acks.taken_over(lost, number))
        client.eval(_STRIKE_OFF, 3, theirs, keys.beat(lost), keys.workers, lost)
        if numbers:
            self._has_taken_over = True
            logger.error(
                "worker %s has shown no sign of life for %.0f s: it left %d inputs that it had "
                "acknowledged",
                early_acks.node(lost),
                self._lifetime,
                len(numbers),
            )

    def _answer_all(self, backend: Any, keys: early_acks.Keys) -> bool:
        """Store the failure of everything that was taken over; whether nothing is left."""
        mine = keys.records(self.worker)
        is_done = True
        for number, record in backend.client.hgetall(mine).items():
            lost = early_acks.lost_worker(number.decode())
            if lost is None:
                continue
            try:
                self._answer(backend, record, early_acks.node(lost))
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

    def _leave(self, backend: Any, keys: early_acks.Keys) -> None:
        beat = keys.beat(self.worker)
        backend.client.delete(beat)
        mine = keys.records(self.worker)
        backend.client.eval(_STRIKE_OFF, 3, mine, beat, keys.workers, self.worker)


def of(app: Any, settings: conf.Settings, hostname: str) -> Janitor | None:
    """Return the janitor of a worker; None where results are not in Redis, or it is switched off.

    Backends derived from Redis (Sentinel) write results without the pipelines that records need.
    """
    if settings.worker_ttl is None or type(app.backend) is not RedisBackend:
        return None
    return Janitor(app, hostname, settings.worker_ttl)
