"""Calls the probe methods of loaded instances in a child, on the parent's orders.

A probe bypasses Celery's tracer: it leaves no results, events or signals, and needs no slot.
The parent enforces the timeout; the child only cancels a coroutine that the parent gave up.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kombu.utils.encoding import safe_repr

from gw_celery import errors
from gw_celery.declare import services
from gw_celery.protocol import frames
from gw_celery.replica import tracer
from gw_celery.runtime import batcher, body, in_process, loop

_LONGEST_DETAIL = 200
#: The answer for a class without an instance: a parameter has no default.
_NOTHING_LOADED = {"ok": True, "loaded": 0}


class Probes:
    """The probes of this replica; on its loop.

    Args:
        runtime: the loaded instances.
        served: the services of this replica.
        link: the connection to the parent.
        around: calls a function, with the setup that a thread needs.
    """

    def __init__(
        self,
        runtime: in_process.LocalRuntime,
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
        """Call one probe, and report its answer under this number, however it ends."""
        # An empty context, because a probe belongs to no input and no task.
        answer, context = self._answer(number, service, method), contextvars.Context()
        self._tasks.start(answer, f"probe {service}.{method}", context)

    def close(self) -> None:
        """Cancel running probes; threads end with the process."""
        self._tasks.cancel()

    async def _answer(self, number: int, service: str, name: str) -> None:
        began = time.monotonic()
        try:
            answer = await self._call(self._services[service], name)
            detail = "" if answer is None else safe_repr(answer)
            if isinstance(answer, Mapping) and "ok" in answer:
                is_ok = bool(answer["ok"])
            else:  # also the False of numpy and torch
                is_boolean = str(getattr(answer, "dtype", "")).removeprefix("torch.") == "bool"
                is_ok = answer is not False and (not is_boolean or bool(answer))
        except Exception as exc:
            is_ok, detail = False, errors.titled(exc)
        seconds = time.monotonic() - began
        text = errors.cut(" ".join(detail.split()), _LONGEST_DETAIL)
        self._link.report(frames.Report.PROBED, number, is_ok, text, seconds)

    async def _call(self, service: services.Service, name: str) -> Any:
        method = service.methods[name]
        owner = self._runtime.instances[service.key]
        loaded = owner.take_any()
        if loaded is None:
            return _NOTHING_LOADED
        try:
            bound = getattr(loaded.view(loaded.values), name)
            args, kwargs = batcher.of_one_input(method, (), {})
            if not method.is_async:
                run = functools.partial(bound, *args, **kwargs)
                answer = await loop.in_thread(body.call, self._around, run)
            else:
                limits = (probe.timeout_s for probe in service.probes if probe.method == name)
                with body.Contained():
                    async with asyncio.timeout(max(limits, default=None)):
                        answer = await bound(*args, **kwargs)
        finally:
            owner.give_back(loaded)
        return batcher.only_answer(method, answer)
