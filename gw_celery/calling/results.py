"""Answers of our tasks: Celery's result, made safe to read, and a call under way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import celery.exceptions
from celery import states
from celery.result import AsyncResult

from gw_celery import errors
from gw_celery.calling import outcome, waiting


class Result(AsyncResult):
    """Celery's ``AsyncResult`` whose errors are known classes or ``RemoteTaskError``."""

    def maybe_throw(
        self, propagate: bool = True, callback: Callable[[str, Any], Any] | None = None
    ) -> Any:
        meta = self._get_task_meta() if self._cache is None else self._cache
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            outcome.value_of(meta)
        if callback is not None:
            callback(self.id, meta["result"])
        return meta["result"]

    maybe_reraise = maybe_throw


class Spawned:
    """A call under way: ``get`` it, ``await`` it, or ``cancel`` it."""

    def __init__(self, result: Any, task_name: str, timeout: float | None) -> None:
        self.result = result
        self._task_name = task_name
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Spawned {self._task_name}[{self.id}]>"

    @property
    def id(self) -> str:
        return str(self.result.id)

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer, ``timeout`` seconds at most, and return it or raise its error.

        Raises:
            BlockingCallError: on a running event loop; ``await`` it there.
            CallTimeout: when it is not there in time; the call is revoked.
        """
        waiting.require_no_loop(f"{self._task_name}[{self.id}].get()")
        bound = timeout if timeout is not None else self._timeout
        try:
            return self.result.get(timeout=bound)
        except celery.exceptions.TimeoutError as exc:
            self.cancel()
            raise errors.CallTimeout(waiting.too_late(self._task_name, self.id, bound)) from exc

    def cancel(self) -> None:
        """Revoke the call: it is not started any more; a body that runs goes on."""
        self.result.revoke()

    def __await__(self) -> Generator[Any, Any, Any]:
        return waiting.answer(self.result, self._task_name, self._timeout).__await__()
