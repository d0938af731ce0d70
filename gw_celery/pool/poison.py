"""Which inputs were in flight when a child died, so that one that kills is found and given up.

The counts are shared by all workers through Redis where the result backend or the broker is one;
else each worker counts for itself. A thread talks to Redis, so that the worker's loop never waits.
"""

from __future__ import annotations

import collections
import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis import Redis

    from gw_celery.pool.child_process import Sockets
    from gw_celery.pool.request import PoolRequest

logger = logging.getLogger(__name__)

#: Suspects that are remembered; an input that never comes back must not stay for ever.
_MOST = 100_000
#: Seconds after which Redis forgets a suspect.
_LIFETIME = 86_400
_PREFIX = "gw:deaths:"
#: Orders that may wait for Redis; with more, each worker counts for itself.
_LONGEST_QUEUE = 10_000


class PoisonCounter:
    """Suspects by task id, with the number of children that died while they ran alone.

    Args:
        most: deaths while alone after which an input is given up.
        sockets: woken for each answer of Redis, which the pool then takes in.
        connect: returns a client of the Redis where the workers' counts meet; called in the thread.
            ``None`` without a Redis.
    """

    def __init__(
        self, most: int, sockets: Sockets, connect: Callable[[], Redis] | None = None
    ) -> None:
        self._most = most
        self._sockets = sockets
        self._connect = connect
        self._alone: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._orders: queue.Queue[Callable[[Redis], object] | None]
        self._orders = queue.Queue(_LONGEST_QUEUE)
        self._answers: collections.deque[tuple[int, str, int | None]] = collections.deque()
        self._thread: threading.Thread | None = None

    def record(self, inputs: Iterable[PoolRequest]) -> None:
        """A child died with these inputs in flight; one that ran alone is to blame."""
        for lost in inputs:
            task_id, deaths = lost.task_id, int(lost.runs_alone)
            self._remember(task_id, self.count(task_id) + deaths)
            self._order(functools.partial(_add, task_id=task_id, deaths=deaths))

    def ask(self, number: int, task_id: str) -> bool:
        """Have other workers' count of an input read; ``answers`` yields ``number`` after that.

        Returns:
            Whether there is an answer to come.
        """
        return self._order(functools.partial(self._read, number=number, task_id=task_id))

    def answers(self) -> Iterator[int]:
        """Take in what Redis has answered, and yield the numbers that were asked for."""
        while self._answers:
            number, task_id, count = self._answers.popleft()
            if count is not None:
                # A death that was seen here may not have reached Redis yet.
                self._remember(task_id, max(count, self.count(task_id)))
            yield number

    def forget(self, task_id: str) -> None:
        """The input is answered, whatever killed children before."""
        self._alone.pop(task_id, None)
        self._order(lambda client: client.delete(_PREFIX + task_id))

    def count(self, task_id: str) -> int:
        """Children that died while the input ran alone, as far as is known here."""
        return self._alone.get(task_id, 0)

    def is_suspect(self, task_id: str) -> bool:
        return task_id in self._alone

    def is_poison(self, task_id: str) -> bool:
        return self.count(task_id) >= self._most

    def close(self) -> None:
        if self._thread is not None:
            self._order(None)
            self._thread.join(1.0)

    def _remember(self, task_id: str, count: int) -> None:
        self._alone.pop(task_id, None)
        self._alone[task_id] = count
        while len(self._alone) > _MOST:
            self._alone.popitem(last=False)

    # -- the thread that talks to Redis; it starts with the first order --

    def _order(self, order: Callable[[Redis], object] | None) -> bool:
        if self._connect is None:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gw-deaths", daemon=True)
            self._thread.start()
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        client = None
        while (order := self._orders.get()) is not None:
            try:
                client = client or (self._connect and self._connect())
            except Exception:
                logger.warning("no Redis to count deaths in: each worker counts", exc_info=True)
            try:
                order(client)  # type: ignore[arg-type]  # without a client it raises, and answers
            except Exception as exc:
                logger.warning("the counts of deaths in Redis could not be used: %r", exc)

    def _read(self, client: Redis, number: int, task_id: str) -> None:
        count = None
        try:
            stored = client.get(_PREFIX + task_id)
            count = None if stored is None else int(stored)
        finally:  # an answer comes in any case
            self._answers.append((number, task_id, count))
            self._sockets.wake()


def _add(client: Redis, task_id: str, deaths: int) -> None:
    with client.pipeline() as pipe:
        pipe.incrby(_PREFIX + task_id, deaths)
        pipe.expire(_PREFIX + task_id, _LIFETIME)
        pipe.execute()
