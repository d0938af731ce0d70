"""Call the probe methods of what this replica has loaded, when its parent says so.

Not through Celery's tracer: a probe leaves nothing in results, events or signals, and takes no slot
from an input. The parent counts the time; here a coroutine that it gave up is cancelled, so that it
can be called again.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kombu.utils.encoding import safe_repr

from gw_celery.declare import services
from gw_celery.protocol import frames
from gw_celery.runtime import batch_items, body_guard, in_process, loop

_LONGEST_DETAIL = 200
#: What stands for the answer of a class without an instance: its parameters have no defaults.
_NOTHING_LOADED = {"ok": True, "loaded": 0}


class Probes:
    """The probes of this replica; on its loop.

    Args:
        runtime: what it has loaded.
        served: the services that it serves.
        report: takes a report for the parent.
        around: calls what it is given, with whatever must surround work in a thread.
    """

    def __init__(
        self,
        runtime: in_process.Process,
        served: Iterable[services.Service],
        report: Callable[[tuple[Any, ...]], None],
        around: Callable[..., Any],
    ) -> None:
        self._runtime = runtime
        self._services = {one.key: one for one in served}
        self._report = report
        self._around = around
        self._calls: set[asyncio.Task[None]] = set()

    def call(self, number: int, service: str, method: str) -> None:
        """Call one probe; its answer is reported under this number, however it ends."""
        # In a context of its own: it belongs to no input and to no task.
        task = asyncio.get_running_loop().create_task(
            self._answer(number, service, method),
            name=f"probe {service}.{method}",
            context=contextvars.Context(),
        )
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def close(self) -> None:
        """Stop what still runs; threads end with the process."""
        for one in self._calls:
            one.cancel()

    async def _answer(self, number: int, service: str, method: str) -> None:
        began = time.monotonic()
        try:
            is_ok, detail = judge(await self._called(self._services[service], method))
        except Exception as exc:
            is_ok, detail = False, f"{type(exc).__name__}: {exc}".rstrip(": ")
        seconds = time.monotonic() - began
        self._report((frames.Report.PROBED, number, is_ok, _short(detail), seconds))

    async def _called(self, service: services.Service, name: str) -> Any:
        method = service.methods[name]
        owner = self._runtime.instances_of(service)
        loaded = owner.take_any()
        if loaded is None:
            return _NOTHING_LOADED
        try:
            bound = getattr(owner.view(loaded, loaded.values), name)
            args, kwargs = batch_items.of_one_input(method, (), {})
            answer = await self._run(service, method, lambda: bound(*args, **kwargs))
        finally:
            owner.give_back(loaded)
        return batch_items.only_answer(method, answer)

    async def _run(
        self, service: services.Service, method: services.Method, run: Callable[[], Any]
    ) -> Any:
        if not method.is_async:
            return await loop.in_thread(self._contained, run)
        with body_guard.Contained():
            limits = (one.timeout_s for one in service.probes if one.method == method.name)
            async with asyncio.timeout(max(limits, default=None)):
                return await run()

    def _contained(self, run: Callable[[], Any]) -> Any:
        with body_guard.Contained():
            return self._around(run)


def judge(answer: Any) -> tuple[bool, str]:
    """Say whether a probe that returned ``answer`` has passed, and what it returned.

    ``False`` fails, numpy's and torch's too; so does a mapping whose ``ok`` is falsy.
    """
    if isinstance(answer, Mapping) and "ok" in answer:
        return bool(answer["ok"]), safe_repr(answer)
    return not _is_false(answer), "" if answer is None else safe_repr(answer)


def _is_false(answer: Any) -> bool:
    is_boolean = str(getattr(answer, "dtype", "")).removeprefix("torch.") == "bool"
    return answer is False or (is_boolean and not answer)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_DETAIL else line[: _LONGEST_DETAIL - 3] + "..."
