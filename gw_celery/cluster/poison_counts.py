"""How many children each input has killed, shared by all workers in Redis.

The thread of ``membership`` talks to Redis, so that the worker's loop never waits.
"""

from __future__ import annotations

import collections
import contextlib
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

#: What is called with a count, in the pool's thread; ``None`` for one that is not known.
Then = Callable[[int | None], None]


class Shared:
    """The counts, as the pool asks for them.

    Args:
        thread: it calls ``ask_redis`` and ``answer`` in each of its rounds.
        wake: has ``settle`` called soon, in the pool's thread.
    """

    def __init__(
        self, thread: background_thread.BackgroundThread, wake: Callable[[], None]
    ) -> None:
        self._thread = thread
        self._wake = wake
        #: By task id: whom to tell its count, by how much that grows, or ``None`` to forget it.
        self._orders: collections.deque[tuple[str, Then | int | None]] = collections.deque()
        self._asked: list[tuple[str, Then | int | None]] = []
        self._answers: collections.deque[tuple[Then, int | None]] = collections.deque()

    # -- in the pool's thread --

    def record(self, task_id: str, *, is_alone: bool) -> None:
        """Count a child that died with this input in flight; one that ran alone is to blame."""
        self._order(task_id, int(is_alone))

    def ask(self, task_id: str, then: Then) -> bool:
        """Have ``then`` called with the count, by ``settle``; whether it will be."""
        return self._order(task_id, then)

    def forget(self, task_id: str) -> None:
        """The input was answered, whatever killed children before."""
        self._order(task_id, None)

    def settle(self) -> None:
        """Act on what Redis has answered."""
        while self._answers:
            then, count = self._answers.popleft()
            then(count)

    def close(self) -> None:
        """The thread carries out what was ordered before it ends: nothing is left to do."""

    def _order(self, task_id: str, what: Then | int | None) -> bool:
        if len(self._orders) >= _MOST or self._thread.is_closed:
            return False
        self._orders.append((task_id, what))
        self._thread.wake()
        return True

    # -- in the thread that talks to Redis --

    def ask_redis(self, pipe: Any, prefix: str) -> None:
        """Write a command for each order into a pipeline."""
        while self._orders:
            task_id, what = self._orders.popleft()
            self._asked.append((task_id, what))
            key = f"{prefix}{task_id}"
            if what is None:
                pipe.delete(key)
            elif isinstance(what, int):
                pipe.eval(_COUNT, 1, key, what, _LIFETIME)
            else:
                pipe.get(key)

    def answer(self, answers: Iterator[Any]) -> None:
        """Take in what Redis answered to these commands."""
        asked, self._asked = self._asked, []
        for _, what in asked:
            self._answer(what, next(answers))

    def fail(self) -> None:
        """Redis is away: each worker counts for itself, and no input waits for an answer."""
        asked, self._asked = [*self._asked, *self._orders], []
        self._orders.clear()
        for _, what in asked:
            self._answer(what, None)

    def _answer(self, what: Then | int | None, answer: Any) -> None:
        if not callable(what):
            return
        count = None
        with contextlib.suppress(TypeError, ValueError):  # also what is there is no count
            count = int(answer)
        self._answers.append((what, count))
        self._wake()
