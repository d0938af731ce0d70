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
from gw_celery.replica import tracer
from gw_celery.runtime import batch_items, body_guard, in_process, loop

_LONGEST_DETAIL = 200
#: What stands for the answer of a class without an instance: its parameters have no defaults.
_NOTHING_LOADED = {"ok": True, "loaded": 0}


class Probes:
    """The probes of this replica; on its loop.

    Args:
        runtime: what it has loaded.
        served: the services that it serves.
        link: the way to the parent.
        around: calls what it is given, with whatever must surround work in a thread.
    """

    def __init__(
        self,
        runtime: in_process.Process,
        served: Iterable[services.Service],
        link: tracer.Link,
        around: Callable[..., Any],
    ) -> None:
        self._runtime = runtime
        self._services = {service.key: service for service in served}
        self._link = link
        self._around = around
        self._tasks = loop.Tasks()

    def start(self, number: int, service: str, method: str) -> None:
        """Call one probe; its answer is reported under this number, however it ends."""
        # In a context of its own: it belongs to no input and to no task.
        answer, context = self._answer(number, service, method), contextvars.Context()
        self._tasks.start(answer, f"probe {service}.{method}", context)

    def close(self) -> None:
        """Stop what still runs; threads end with the process."""
        self._tasks.cancel()

    async def _answer(self, number: int, service: str, method: str) -> None:
        began = time.monotonic()
        try:
            is_ok, detail = judge(await self._called(self._services[service], method))
        except Exception as exc:
            is_ok, detail = False, f"{type(exc).__name__}: {exc}".rstrip(": ")
        seconds = time.monotonic() - began
        text = frames.cut(" ".join(detail.split()), _LONGEST_DETAIL)
        self._link.report(frames.Report.PROBED, number, is_ok, text, seconds)

    async def _called(self, service: services.Service, name: str) -> Any:
        method = service.methods[name]
        owner = self._runtime.instances_of(service)
        loaded = owner.take_any()
        if loaded is None:
            return _NOTHING_LOADED
        try:
            bound = getattr(loaded.view(loaded.values), name)
            args, kwargs = batch_items.of_one_input(method, (), {})
            answer = await self._run(service, method, lambda: bound(*args, **kwargs))
        finally:
            owner.give_back(loaded)
        return batch_items.only_answer(method, answer)

    async def _run(
        self, service: services.Service, method: services.Method, run: Callable[[], Any]
    ) -> Any:
        if not method.is_async:
            return await loop.in_thread(body_guard.call, self._around, run)
        with body_guard.Contained():
            probes = (probe for probe in service.probes if probe.method == method.name)
            limits = (probe.timeout_s for probe in probes)
            async with asyncio.timeout(max(limits, default=None)):
                return await run()


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
