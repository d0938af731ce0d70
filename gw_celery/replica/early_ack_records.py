"""Records, in Redis, of the inputs of this replica that are acknowledged when they begin.

They travel in the pipelines of the results. An input that is acknowledged when it ends has none.
"""

from __future__ import annotations

import logging
from typing import Any

from gw_celery import errors
from gw_celery.cluster import early_acks
from gw_celery.replica import input as replica_input
from gw_celery.runtime import loop

logger = logging.getLogger(__name__)


class Records:
    """What a worker's early inputs leave in Redis while they run.

    Args:
        app: the Celery app, whose backend groups what it writes.
        worker: the start of the worker, by which its records are kept.
    """

    def __init__(self, app: Any, worker: str) -> None:
        self._app = app
        self._key = early_acks.records_key(app.backend, worker)
        self._held: set[int] = set()
        self._tasks = loop.Tasks()

    def has(self, name: str) -> bool:
        """Whether inputs of this task are acknowledged when they begin."""
        task = self._app.tasks.get(name)
        return task is not None and not task.acks_late

    async def begin(self, input: replica_input.Input, request: Any, arguments: Any) -> None:
        """Record an input that is about to start; without Redis it starts all the same."""
        record = self._written(input, request, arguments)
        self._held.add(input.number)
        try:
            await self._app.backend.command("hset", self._key, str(input.number), record)
        except Exception as exc:
            logger.warning(
                "task %s[%s] starts without a record: if its worker is killed it stays unanswered: "
                "%r",
                input.name,
                input.task_id,
                exc,
            )

    def end(self, number: int) -> None:
        """Have the record of an input removed soon, if it has one."""
        if number in self._held:
            self._held.discard(number)
            self._tasks.start(self._remove(str(number)), f"record of input {number}")

    async def _remove(self, number: str) -> None:
        try:
            await self._app.backend.command("hdel", self._key, number)
        except Exception as exc:  # its result is there, too
            logger.warning("the record of input %s stays: %r", number, exc)

    def _written(self, input: replica_input.Input, request: Any, arguments: Any) -> bytes:
        embed = arguments[2] if len(arguments) > 2 else None
        try:
            return early_acks.write(request, embed)
        except errors.SerializationError as exc:
            logger.warning(
                "task %s[%s] has callbacks that cannot be recorded: %s",
                input.name,
                input.task_id,
                exc,
            )
            return early_acks.write(request, None)


def of(app: Any, worker: str | None) -> Records | None:
    """Return the records of a worker; ``None`` where none are kept."""
    if worker is None or not hasattr(app.backend, "command"):
        return None
    return Records(app, worker)
