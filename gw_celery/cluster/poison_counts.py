"""How many children each input has killed, shared by all workers in Redis.

The thread of ``membership`` talks to Redis, so that the worker's loop never waits.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from gw_celery import background_thread

logger = logging.getLogger(__name__)

#: Seconds after which Redis forgets an input.
_LIFETIME = 86_400
#: Orders that may wait for Redis; with more, each worker counts for itself.
_MOST = 10_000

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
        self._changing = threading.Lock()
        self._orders: list[tuple[str, str, Any]] = []
        self._asked: list[tuple[str, str, Any]] = []
        self._answers: collections.deque[tuple[Then, int | None]] = collections.deque()

    # -- in the pool's thread --

    def record(self, task_id: str, *, is_alone: bool) -> None:
        """Count a child that died with this input in flight; one that ran alone is to blame."""
        self._order("record", task_id, int(is_alone))

    def ask(self, task_id: str, then: Then) -> bool:
        """Have ``then`` called with the count, by ``settle``; whether it will be."""
        return self._order("ask", task_id, then)

    def forget(self, task_id: str) -> None:
        """The input was answered, whatever killed children before."""
        self._order("forget", task_id, None)

    def settle(self) -> None:
        """Act on what Redis has answered."""
        while self._answers:
            then, count = self._answers.popleft()
            then(count)

    def close(self) -> None:
        """Nothing is left to do: the thread carries out what was ordered before it ends."""

    def _order(self, what: str, task_id: str, argument: Any) -> bool:
        with self._changing:
            if len(self._orders) >= _MOST or self._thread.is_closed:
                return False
            self._orders.append((what, task_id, argument))
        self._thread.wake()
        return True

    # -- in the thread that talks to Redis --

    def ask_redis(self, pipe: Any, prefix: str) -> None:
        """Write the commands for what was ordered into a pipeline."""
        with self._changing:
            self._asked, self._orders = self._orders, []
        for what, task_id, argument in self._asked:
            key = f"{prefix}{task_id}"
            if what == "ask":
                pipe.get(key)
            elif what == "forget":
                pipe.delete(key)
            else:
                pipe.incrby(key, argument)
                pipe.expire(key, _LIFETIME)

    def answer(self, answers: Iterator[Any]) -> None:
        """Take in what Redis answered to these commands."""
        asked, self._asked = self._asked, []
        for what, _, argument in asked:
            answer = next(answers)
            if what == "record":
                next(answers)
            elif what == "ask":
                self._answer(argument, answer)

    def fail(self) -> None:
        """Redis is away: each worker counts for itself, and no input waits for an answer."""
        with self._changing:
            orders, self._orders = self._asked + self._orders, []
            self._asked = []
        for what, _, argument in orders:
            if what == "ask":
                self._answer(argument, None)

    def _answer(self, then: Then, answer: Any) -> None:
        count = None
        with contextlib.suppress(TypeError, ValueError):  # also what is there is no count
            count = int(answer)
        self._answers.append((then, count))
        self._wake()
