"""Which inputs were in flight when a child died, so that one that kills is found and given up.

The counts are shared by all workers through Redis where the result backend or the broker is one;
else each worker counts for itself. A thread talks to Redis, so that the worker's loop never waits.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

#: Suspects that are remembered; an input that never comes back must not stay for ever.
_MOST = 100_000
#: Seconds after which Redis forgets a suspect.
_LIFETIME = 86_400
_PREFIX = "gw:deaths:"
#: Orders that may wait for Redis; with more, each worker counts for itself.
_LONGEST_QUEUE = 10_000


class Input(Protocol):
    """An input that was in flight when its child died."""

    @property
    def task_id(self) -> str: ...

    @property
    def runs_alone(self) -> bool: ...


class PoisonCounter:
    """Suspects by task id, with the number of children that died while they ran alone.

    Args:
        most: deaths while alone after which an input is given up.
        shared: where the workers' counts meet; ``None`` where there is no Redis.
    """

    def __init__(self, most: int, shared: SharedCounts | None = None) -> None:
        self._most = most
        self._shared = shared
        self._alone: collections.OrderedDict[str, int] = collections.OrderedDict()

    def record(self, inputs: Iterable[Input]) -> None:
        """A child died with these inputs in flight; one that ran alone is to blame."""
        for lost in inputs:
            self._remember(lost.task_id, self.count(lost.task_id) + int(lost.runs_alone))
            if self._shared is not None:
                self._shared.add(lost.task_id, int(lost.runs_alone))

    def ask(self, number: int, task_id: str) -> bool:
        """Have other workers' count of an input read; ``answers`` yields ``number`` after that.

        Returns:
            Whether there is an answer to come.
        """
        return self._shared is not None and self._shared.read(number, task_id)

    def answers(self) -> Iterator[int]:
        """Take in what Redis has answered, and yield the numbers that were asked for."""
        if self._shared is None:
            return
        for number, task_id, count in self._shared.answers():
            if count is not None:
                # A death that was seen here may not have reached Redis yet.
                self._remember(task_id, max(count, self.count(task_id)))
            yield number

    def forget(self, task_id: str) -> None:
        """The input is answered, whatever killed children before."""
        self._alone.pop(task_id, None)
        if self._shared is not None:
            self._shared.delete(task_id)

    def count(self, task_id: str) -> int:
        """Children that died while the input ran alone, as far as is known here."""
        return self._alone.get(task_id, 0)

    def is_suspect(self, task_id: str) -> bool:
        return task_id in self._alone

    def is_poison(self, task_id: str) -> bool:
        return self.count(task_id) >= self._most

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def _remember(self, task_id: str, count: int) -> None:
        self._alone.pop(task_id, None)
        self._alone[task_id] = count
        while len(self._alone) > _MOST:
            self._alone.popitem(last=False)


class Wakeable(Protocol):
    """What reads the answers."""

    def wake(self) -> None:
        """Have them read soon; from any thread."""


class SharedCounts:
    """The counts in Redis, kept by a thread that is started when the first child dies.

    Args:
        connect: returns a Redis client; called in the thread.
        reader: is woken for each answer.
    """

    def __init__(self, connect: Callable[[], Redis], reader: Wakeable) -> None:
        self._connect = connect
        self._reader = reader
        self._orders: queue.Queue[Callable[[Redis], None] | None] = queue.Queue(_LONGEST_QUEUE)
        self._answers: collections.deque[tuple[int, str, int | None]] = collections.deque()
        self._thread: threading.Thread | None = None

    def add(self, task_id: str, deaths: int) -> None:
        key = _PREFIX + task_id

        def write(client: Redis) -> None:
            with client.pipeline() as pipe:
                pipe.incrby(key, deaths)
                pipe.expire(key, _LIFETIME)
                pipe.execute()

        self._order(write)

    def read(self, number: int, task_id: str) -> bool:
        """Have a count read; whether ``answers`` will have it."""

        def read(client: Redis) -> None:
            count = None
            try:
                stored = client.get(_PREFIX + task_id)
                count = None if stored is None else int(stored)
            finally:  # an answer comes in any case
                self._answers.append((number, task_id, count))
                self._reader.wake()

        return self._order(read)

    def delete(self, task_id: str) -> None:
        def delete(client: Redis) -> None:
            client.delete(_PREFIX + task_id)

        self._order(delete)

    def answers(self) -> Iterator[tuple[int, str, int | None]]:
        """Yield what was read; ``None`` for a count that is not there, or could not be read."""
        while self._answers:
            yield self._answers.popleft()

    def close(self) -> None:
        if self._thread is not None:
            self._order(None)
            self._thread.join(1.0)

    def _order(self, order: Callable[[Redis], None] | None) -> bool:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gw-deaths", daemon=True)
            self._thread.start()
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        client: Redis | None = None
        while (order := self._orders.get()) is not None:
            try:
                client = client or self._connect()
            except Exception:
                logger.warning("no Redis to count deaths in: each worker counts", exc_info=True)
            try:
                order(client)  # type: ignore[arg-type]  # without a client it raises, and answers
            except Exception as exc:
                logger.warning("the counts of deaths in Redis could not be used: %r", exc)
