"""Counts of what each input has cost, shared by all workers in Redis.

An input counts the children that it has killed and, under a second key, how often it was given back
because its answer could not be stored.

The thread of ``membership`` talks to Redis, so that the loop of the worker's parent never waits.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gw_celery import background_thread

#: Seconds after which Redis forgets an input.
_LIFETIME = 86_400
#: Maximum number of orders that wait for Redis; beyond it, each worker counts for itself.
_MOST = 10_000
#: Adds to a count. The increment is 0 if the input was in flight together with others.
_COUNT = """
local counted = redis.pcall('INCRBY', KEYS[1], ARGV[1])
if type(counted) == 'table' then
  local is_foreign = string.find(counted.err, 'WRONGTYPE') or string.find(counted.err, 'integer')
  if not is_foreign then return counted end
  redis.call('SET', KEYS[1], ARGV[1])
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""

#: Maximum of a count; larger ones are not ours.
_LARGEST = 1_000_000
#: Ends the key of the second count.
_RETURNS = ".returns"

#: Writes a command for the count under a key into a pipeline.
_Write = Callable[[Any, str], object]
#: Number of a question, task id, deaths and returns; a count is ``None`` if it is unknown.
Answer = tuple[int, str, int | None, int | None]


class Shared:
    """The shared counts, for the pool.

    Args:
        thread: calls ``ask_redis`` and ``answer`` in each round.
        wake: makes the pool read ``answers`` soon, in its own thread.
    """

    def __init__(
        self, thread: background_thread.BackgroundThread, wake: Callable[[], None]
    ) -> None:
        self._thread = thread
        self._wake = wake
        #: Command, task id, and the number of the pool's question; ``None`` for none.
        self._orders: collections.deque[tuple[_Write, str, int | None]] = collections.deque()
        self._asked: list[tuple[str, int | None]] = []
        self._answers: collections.deque[Answer] = collections.deque()

    # -- in the pool's thread --

    def record(self, task_id: str, deaths: int) -> None:
        """Count a death for an input in flight; ``deaths`` is 1 if it ran alone, else 0."""
        self._order(lambda pipe, key: pipe.eval(_COUNT, 1, key, deaths, _LIFETIME), task_id)

    def record_return(self, task_id: str) -> None:
        """Count that an input was given back because its answer could not be stored."""
        self._order(lambda pipe, key: pipe.eval(_COUNT, 1, key + _RETURNS, 1, _LIFETIME), task_id)

    def ask(self, number: int, task_id: str) -> bool:
        """Request the counts of an input; return whether ``answers`` will have them."""
        return self._order(lambda pipe, key: pipe.mget(key, key + _RETURNS), task_id, number)

    def forget(self, task_id: str) -> None:
        """Delete the counts of an input that has been answered."""
        self._order(lambda pipe, key: pipe.delete(key, key + _RETURNS), task_id)

    def answers(self) -> Iterator[Answer]:
        while self._answers:
            yield self._answers.popleft()

    def _order(self, write: _Write, task_id: str, number: int | None = None) -> bool:
        if len(self._orders) >= _MOST or self._thread.is_closed:
            return False
        self._orders.append((write, task_id, number))
        self._thread.wake()
        return True

    # -- in the thread that talks to Redis --

    def ask_redis(self, pipe: Any, prefix: str) -> None:
        while self._orders:
            write, task_id, number = self._orders.popleft()
            self._asked.append((task_id, number))
            write(pipe, f"{prefix}{task_id}")

    def answer(self, answers: Iterator[Any]) -> None:
        asked, self._asked = self._asked, []
        for task_id, number in asked:
            answer = next(answers)
            if number is None:
                continue
            deaths, returns = answer if isinstance(answer, list) else (None, None)
            self._answers.append((number, task_id, _count(deaths), _count(returns)))
            self._wake()

    def fail(self) -> None:
        """Answer all questions with "unknown" while Redis is unreachable."""
        while self._orders:
            _, task_id, number = self._orders.popleft()
            self._asked.append((task_id, number))
        self.answer(iter([None] * len(self._asked)))


def _count(stored: Any) -> int | None:
    with contextlib.suppress(TypeError, ValueError):  # also if the value is not a count
        if 0 <= (count := int(stored)) <= _LARGEST:
            return count
    return None
