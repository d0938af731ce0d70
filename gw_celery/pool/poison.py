"""Which inputs were in flight when a child died, so that one that kills is found and given up.

The counts are shared by all workers through Redis where the result backend or the broker is one;
else each worker counts for itself. A thread talks to Redis, so that the worker's loop never waits.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)

#: Suspects that are remembered; an input that never comes back must not stay for ever.
_MOST = 100_000
#: Seconds after which Redis forgets a suspect.
_LIFETIME = 86_400
_PREFIX = "gw:deaths:"
#: Questions that may wait for Redis; with more, each worker counts for itself.
_LONGEST_QUEUE = 10_000


class Deaths:
    """Suspects by task id, with the number of children that died while they ran alone.

    Args:
        most: deaths while alone after which an input is given up.
        shared: where the workers' counts meet, if anywhere.
    """

    def __init__(self, most: int, shared: Shared | None = None) -> None:
        self._most = most
        self._shared = shared
        self._alone: collections.OrderedDict[str, int] = collections.OrderedDict()

    def record(self, jobs: Iterable[Any]) -> None:
        """A child died with these inputs in flight; one that ran alone is to blame."""
        for job in jobs:
            self._remember(job.task_id, self._alone.get(job.task_id, 0) + bool(job.runs_alone))
            if self._shared is not None:
                self._shared.record(job.task_id, is_alone=job.runs_alone)

    def ask(self, task_id: str, then: Callable[[], None]) -> bool:
        """Learn what other workers saw of a redelivered input; ``then`` is called with it known.

        Returns False when there is nobody to ask.
        """
        if self._shared is None:
            return False

        def known(count: int | None) -> None:
            if count is not None:
                # A death that was seen here may not have reached Redis yet.
                self._remember(task_id, max(count, self._alone.get(task_id, 0)))
            then()

        return self._shared.ask(task_id, known)

    def survived(self, task_id: str) -> None:
        """The input was answered, whatever killed children before."""
        self._alone.pop(task_id, None)
        if self._shared is not None:
            self._shared.forget(task_id)

    def count(self, task_id: str) -> int:
        """Children that died while the input ran alone, as far as is known here."""
        return self._alone.get(task_id, 0)

    def is_suspect(self, task_id: str) -> bool:
        return task_id in self._alone

    def is_poison(self, task_id: str) -> bool:
        return self.count(task_id) >= self._most

    def settle(self) -> None:
        """Act on what Redis has answered; in the pool's thread."""
        if self._shared is not None:
            self._shared.settle()

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def _remember(self, task_id: str, count: int) -> None:
        self._alone.pop(task_id, None)
        self._alone[task_id] = count
        while len(self._alone) > _MOST:
            self._alone.popitem(last=False)


class Shared:
    """The counts in Redis, kept by a thread that is started when the first child dies.

    Args:
        connect: returns a Redis client; called in the thread.
        wake: has ``settle`` called soon, in the pool's thread.
    """

    def __init__(self, connect: Callable[[], Any], wake: Callable[[], None]) -> None:
        self._connect = connect
        self._wake = wake
        self._client: Any = None
        self._orders: queue.Queue[Callable[[], None] | None] = queue.Queue(_LONGEST_QUEUE)
        self._answers: collections.deque[tuple[Callable[[int | None], None], int | None]]
        self._answers = collections.deque()
        self._thread: threading.Thread | None = None

    def record(self, task_id: str, *, is_alone: bool) -> None:
        key = _PREFIX + task_id

        def write() -> None:
            with self._client.pipeline() as pipe:
                pipe.incrby(key, int(is_alone))
                pipe.expire(key, _LIFETIME)
                pipe.execute()

        self._order(write)

    def ask(self, task_id: str, then: Callable[[int | None], None]) -> bool:
        def read() -> None:
            count = None
            try:
                stored = self._client.get(_PREFIX + task_id)
                count = None if stored is None else int(stored)
            finally:
                self._answers.append((then, count))
                self._wake()

        return self._order(read)

    def forget(self, task_id: str) -> None:
        self._order(lambda: self._client.delete(_PREFIX + task_id))

    def settle(self) -> None:
        while self._answers:
            then, count = self._answers.popleft()
            then(count)

    def close(self) -> None:
        if self._thread is not None:
            self._order(None)
            self._thread.join(1.0)

    def _order(self, order: Callable[[], None] | None) -> bool:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gw-deaths", daemon=True)
            self._thread.start()
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                if self._client is None:
                    self._client = self._connect()
            except Exception:
                logger.warning("no Redis to count deaths in: each worker counts", exc_info=True)
            try:
                order()  # also without a client: a question is answered in any case
            except Exception as exc:
                logger.warning("the counts of deaths in Redis could not be used: %r", exc)
