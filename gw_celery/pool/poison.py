"""Which inputs were in flight when a child died, so that one that kills is found and given up.

The counts are shared by all workers through Redis where the broker or the result backend is one;
else each worker counts for itself.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

from gw_celery.cluster import poison_counts

#: Suspects that are remembered; an input that never comes back must not stay for ever.
_MOST = 100_000


class Deaths:
    """Suspects by task id, with the number of children that died while they ran alone.

    Args:
        most: deaths while alone after which an input is given up.
        shared: where the workers' counts meet, if anywhere.
    """

    def __init__(self, most: int, shared: poison_counts.Shared | None = None) -> None:
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
