"""Answers of our tasks: Celery's result, made safe to read, and a call under way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from celery import states
from celery.result import AsyncResult, EagerResult

from gw_celery.client import calls, results


class Result(AsyncResult):
    """Celery's ``AsyncResult`` whose errors are known classes or ``RemoteTaskError``."""

    def maybe_throw(
        self, propagate: bool = True, callback: Callable[[str, Any], Any] | None = None
    ) -> Any:
        meta = self._get_task_meta() if self._cache is None else self._cache
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            results.value_of(meta)
        if callback is not None:
            callback(self.id, meta["result"])
        return meta["result"]

    maybe_reraise = maybe_throw

    def _set_cache(self, d: dict[str, Any]) -> Any:
        """Keep a record whose error is safe to raise: a group raises it as it finds it here."""
        stored = d["result"]
        if d["status"] in states.PROPAGATE_STATES and isinstance(stored, BaseException):
            d = {**d, "result": results.checked(stored, d.get("traceback"))}
        return super()._set_cache(d)


class Spawned:
    """A call under way: ``get`` it, ``await`` it, or ``cancel`` it."""

    def __init__(self, sent: Any, task_name: str, timeout: float | None) -> None:
        self._sent = sent
        self._task_name = task_name
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Spawned {self._task_name}[{self.id}]>"

    @property
    def id(self) -> str:
        return str(self._sent.id)

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer, ``timeout`` seconds at most, and return it or raise its error.

        Raises:
            BlockingCallError: on a running event loop, or inside a task; ``await`` it there.
            CallTimeout: when it is not there in time; the call is revoked.
        """
        calls.require_may_block(f"{self._task_name}[{self.id}].get()")
        if isinstance(self._sent, EagerResult):
            return self._sent.get()
        bound = timeout if timeout is not None else self._timeout
        return results.value_of(calls.block(calls.answer(self._sent, self._task_name, bound)))

    def cancel(self) -> None:
        """Revoke the call: it is not started any more; a body that runs goes on."""
        self._sent.revoke()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._value().__await__()

    async def _value(self) -> Any:
        if isinstance(self._sent, EagerResult):
            return self._sent.get(disable_sync_subtasks=False)
        return results.value_of(await calls.answer(self._sent, self._task_name, self._timeout))
