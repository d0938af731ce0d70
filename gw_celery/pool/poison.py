"""Which inputs were in flight when a child died, so that one that kills is found and given up.

The counts are shared by all workers through Redis where the broker or the result backend is one;
else each worker counts for itself.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gw_celery.cluster import poison_counts

if TYPE_CHECKING:
    from gw_celery.pool.requests import PoolRequest

#: Suspects that are remembered; an input that never comes back must not stay for ever.
_MOST = 100_000


class PoisonCounter:
    """Suspects by task id, with the number of children that died while they ran alone.

    Args:
        most: deaths while alone after which an input is given up.
        shared: where the workers' counts meet; ``None`` without a Redis.
    """

    def __init__(self, most: int, shared: poison_counts.Shared | None = None) -> None:
        #: By task id: children that died while it ran alone, as far as is known here.
        self.suspects: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._most = most
        self._shared = shared

    def record(self, inputs: Iterable[PoolRequest]) -> None:
        """A child died with these inputs in flight; one that ran alone is to blame."""
        for lost in inputs:
            task_id, deaths = lost.task_id, int(lost.runs_alone)
            self._remember(task_id, self.suspects.get(task_id, 0) + deaths)
            if self._shared is not None:
                self._shared.record(task_id, deaths)

    def ask(self, number: int, task_id: str) -> bool:
        """Have other workers' count of an input read; ``answers`` yields ``number`` after that.

        Returns:
            Whether there is an answer to come.
        """
        return self._shared is not None and self._shared.ask(number, task_id)

    def answers(self) -> Iterator[int]:
        """Take in what Redis has answered, and yield the numbers that were asked for."""
        for number, task_id, count in () if self._shared is None else self._shared.answers():
            if count is not None:
                # A death that was seen here may not have reached Redis yet.
                self._remember(task_id, max(count, self.suspects.get(task_id, 0)))
            yield number

    def forget(self, task_id: str) -> None:
        """The input is answered, whatever killed children before."""
        self.suspects.pop(task_id, None)
        if self._shared is not None:
            self._shared.forget(task_id)

    def is_poison(self, task_id: str) -> bool:
        return self.suspects.get(task_id, 0) >= self._most

    def _remember(self, task_id: str, count: int) -> None:
        self.suspects[task_id] = count
        self.suspects.move_to_end(task_id)
        while len(self.suspects) > _MOST:
            self.suspects.popitem(last=False)
