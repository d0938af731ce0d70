"""How many children each input has killed, shared by all workers in Redis.

The thread of ``membership`` talks to Redis, so that the worker's loop never waits.
"""

from __future__ import annotations

import collections
import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any

from gw_celery import background_thread

#: Seconds after which Redis forgets an input.
_LIFETIME = 86_400
#: Orders that may wait for Redis; with more, each worker counts for itself.
_MOST = 10_000
#: A count may grow by 0: the input was in flight, and others were as well.
_COUNT = """
redis.call('INCRBY', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


class _Order(enum.Enum):
    COUNT = enum.auto()
    READ = enum.auto()
    FORGET = enum.auto()


class Shared:
    """The counts, as the pool asks for them.

    Args:
        thread: it calls ``ask_redis`` and ``answer`` in each of its rounds.
        wake: has the pool look at ``answers`` soon, in its own thread.
    """

    def __init__(
        self, thread: background_thread.BackgroundThread, wake: Callable[[], None]
    ) -> None:
        self._thread = thread
        self._wake = wake
        #: What is ordered, the task id, and a number: of deaths, or what the pool asks by.
        self._orders: collections.deque[tuple[_Order, str, int]] = collections.deque()
        self._asked: list[tuple[_Order, str, int]] = []
        self._answers: collections.deque[tuple[int, str, int | None]] = collections.deque()

    # -- in the pool's thread --

    def record(self, task_id: str, deaths: int) -> None:
        """A child died with this input in flight; ``deaths`` is 1 if it ran alone, else 0."""
        self._order(_Order.COUNT, task_id, deaths)

    def ask(self, number: int, task_id: str) -> bool:
        """Have the count of an input read; whether ``answers`` will have it."""
        return self._order(_Order.READ, task_id, number)

    def forget(self, task_id: str) -> None:
        """The input is answered, whatever killed children before."""
        self._order(_Order.FORGET, task_id, 0)

    def answers(self) -> Iterator[tuple[int, str, int | None]]:
        """Yield what Redis has answered: number, task id, and the count; ``None``: not known."""
        while self._answers:
            yield self._answers.popleft()

    def _order(self, what: _Order, task_id: str, number: int) -> bool:
        if len(self._orders) >= _MOST or self._thread.is_closed:
            return False
        self._orders.append((what, task_id, number))
        self._thread.wake()
        return True

    # -- in the thread that talks to Redis --

    def ask_redis(self, pipe: Any, prefix: str) -> None:
        """Write a command for each order into a pipeline."""
        while self._orders:
            what, task_id, number = order = self._orders.popleft()
            self._asked.append(order)
            key = f"{prefix}{task_id}"
            if what is _Order.FORGET:
                pipe.delete(key)
            elif what is _Order.COUNT:
                pipe.eval(_COUNT, 1, key, number, _LIFETIME)
            else:
                pipe.get(key)

    def answer(self, answers: Iterator[Any]) -> None:
        """Take in what Redis answered to these commands."""
        asked, self._asked = self._asked, []
        for order in asked:
            self._answer(order, next(answers))

    def fail(self) -> None:
        """Redis is away: each worker counts for itself, and no input waits for an answer."""
        asked, self._asked = self._asked, []
        while self._orders:
            asked.append(self._orders.popleft())
        for order in asked:
            self._answer(order, None)

    def _answer(self, order: tuple[_Order, str, int], answer: Any) -> None:
        what, task_id, number = order
        if what is not _Order.READ:
            return
        count = None
        with contextlib.suppress(TypeError, ValueError):  # also what is there is no count
            count = int(answer)
        self._answers.append((number, task_id, count))
        self._wake()
