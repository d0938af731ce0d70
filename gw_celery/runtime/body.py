"""Run the body of one call: find its instance, wrap what is batched, enforce its limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Coroutine, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from gw_celery.client import execution
from gw_celery.declare import parameters, services
from gw_celery.protocol import headers
from gw_celery.runtime import batch_items, body_guard, greenlet_bridge, instances
from gw_celery.types import ParameterValues

if TYPE_CHECKING:
    from gw_celery.runtime import in_process

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one method, with the limits of its task in seconds."""

    service: services.Service
    method: services.Method
    #: Of every parameter of its service.
    values: ParameterValues
    soft_limit: float | None = None
    hard_limit: float | None = None
    #: The user's arguments, behind the task itself where it is declared with ``bind=True``.
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: Any,
        sent: Mapping[str, Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call:
        """Return one call of ``task`` with the parameters that the headers ``sent`` carry.

        They are checked again: no handle may have made the message.
        """
        request, service = task.request, task.gw_service
        hard, soft = request.timelimit or (None, None)
        values: ParameterValues = {}
        text = (sent or {}).get(headers.PARAMETERS)
        if text or service.parameters:
            given = json.loads(text) if text else {}
            bound = parameters.bind(service.name, service.parameters, given)
            values = parameters.complete(service.parameters, bound)
        return cls(
            service=service,
            method=task.gw_method,
            values=values,
            soft_limit=soft or task.soft_time_limit,
            hard_limit=hard or task.time_limit,
            args=args,
            kwargs=kwargs,
        )


def run(runtime: in_process.Process, call: Call) -> Any:
    """Run ``call`` to its end and return its answer, from Celery's tracer."""
    if call.method.is_async or (call.method.batched and runtime.batchers):
        return _wait_within_limits(runtime, call, run_async(runtime, call))
    return _run_sync(runtime, call)


async def run_async(runtime: in_process.Process, call: Call) -> Any:
    """Run ``call`` on the loop, where an asynchronous caller can await it."""
    held = batch_items.held.set(batch_items.held.get() | {call.service.key})
    batch = execution.batch.set(None)
    try:
        if not call.service.is_class:
            return await _answer(runtime, call, call.method.function)
        values, owner = call.values, runtime.instances_of(call.service)
        loaded = owner.take(values)
        if loaded is None:
            if (joining := batch_items.joining.get()) is not None:
                # Before it joins a batch: limits bound the wait, and a load can kill the process.
                joining.begin()
            loaded = await owner.load(values)
        try:
            bound: Callable[..., Any] = getattr(loaded.view(values), call.method.name)
            key, using = loaded.batch_key(values), functools.partial(owner.using, loaded)
            return await _answer(runtime, call, bound, key=key, using=using)
        finally:
            owner.give_back(loaded)
    finally:
        execution.batch.reset(batch)
        batch_items.held.reset(held)


def _run_sync(runtime: in_process.Process, call: Call) -> Any:
    use = instances.Use(runtime.instances_of(call.service), call.values)
    try:
        if not use.take():
            _wait_within_limits(runtime, call, use.load())
        bound: Callable[..., Any] = getattr(use.view(), call.method.name)
        args, kwargs = batch_items.of_one_input(call.method, call.args, call.kwargs)
        return batch_items.only_answer(call.method, body_guard.call(bound, *args, **kwargs))
    finally:
        use.end()


def _wait_within_limits(runtime: in_process.Process, call: Call, work: Coroutine[Any, Any, T]) -> T:
    """Wait for the loop as part of the input: what stops the input ends the wait."""
    if runtime.is_on_loop():
        return greenlet_bridge.drive(work)
    has_limits = runtime.enforces_limits
    soft, hard = (call.soft_limit, call.hard_limit) if has_limits else (None, None)
    grace = runtime.settings.cancel_timeout
    return greenlet_bridge.LoopCall(runtime.loop, work).run(grace, soft_limit=soft, hard_limit=hard)


async def _answer(
    runtime: in_process.Process,
    call: Call,
    fn: Callable[..., Any],
    *,
    key: Hashable = None,
    using: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    if call.method.batched is not None and runtime.batchers is not None:
        batcher = runtime.batchers.of(call.service, call.method)
        return await batcher.submit(fn, call.args, call.kwargs, key=key, using=using)
    args, kwargs = batch_items.of_one_input(call.method, call.args, call.kwargs)
    if call.method.is_async:
        with body_guard.Contained():
            answer = await fn(*args, **kwargs)
    else:  # it must not stop the loop that it shares with the body that awaits it
        answer = await asyncio.to_thread(body_guard.call_for_future, fn, *args, **kwargs)
    return batch_items.only_answer(call.method, answer)
