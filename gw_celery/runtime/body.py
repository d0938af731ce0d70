"""Run the body of one input: find its instance, wrap what is batched, enforce its limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Coroutine, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from celery.exceptions import SoftTimeLimitExceeded

from gw_celery.client import execution
from gw_celery.declare import parameters, services
from gw_celery.protocol import headers
from gw_celery.runtime import batch_items, body_guard, greenlet_bridge, instances
from gw_celery.types import ParameterValues

if TYPE_CHECKING:
    from gw_celery.runtime import in_process

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One input of one method, with the limits of its task in seconds."""

    task_id: str
    service: services.Service
    method: services.Method
    given: ParameterValues
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
    ) -> Input:
        """Return one input of ``task`` with the parameters that the headers ``sent`` carry.

        They are checked again: no handle may have made the message.
        """
        request, service = task.request, task.gw_service
        hard, soft = request.timelimit or (None, None)
        text = (sent or {}).get(headers.PARAMETERS)
        values = json.loads(text) if text else {}
        return cls(
            task_id=request.id or "",
            service=service,
            method=task.gw_method,
            given=parameters.bind(service.name, service.parameters, values),
            soft_limit=soft or task.soft_time_limit,
            hard_limit=hard or task.time_limit,
            args=args,
            kwargs=kwargs,
        )


class Running:
    """The calls that run in this process, by task id."""

    def __init__(self) -> None:
        self._calls: dict[str, greenlet_bridge.Call[Any]] = {}

    def run(self, runtime: in_process.Process, one: Input, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` of an input on the loop, for a thread that waits, within its limits."""
        call = runtime.call(work)
        self._calls[one.task_id] = call
        has_limit = runtime.enforces_limits and (one.soft_limit or one.hard_limit)
        limits = _Limits(runtime.loop, call, one) if has_limit else None
        try:
            return call.run(runtime.settings.cancel_timeout)
        finally:
            self._calls.pop(one.task_id, None)
            if limits is not None:
                limits.disarm()

    def interrupt(self, task_id: str, exc: BaseException | None) -> bool:
        """Raise ``exc`` in a running input, or stop it without one; whether there was one."""
        call = self._calls.get(task_id)
        if call is None or call.is_over:
            return False
        if exc is None:
            call.abandon(execution.Revoked())
        else:
            call.interrupt(exc)
        return True


running = Running()


def run(runtime: in_process.Process, one: Input) -> Any:
    """Run ``one`` to its end and return its answer, from Celery's tracer."""
    if one.method.is_async or (one.method.batched and runtime.batchers):
        if runtime.is_on_loop():
            return greenlet_bridge.drive(run_async(runtime, one))
        return running.run(runtime, one, run_async(runtime, one))
    return _run_sync(runtime, one)


async def run_async(runtime: in_process.Process, one: Input) -> Any:
    """Run ``one`` on the loop, where an asynchronous caller can await it."""
    held = batch_items.held.set(batch_items.held.get() | {one.service.key})
    batch = execution.batch.set(None)
    try:
        if not one.service.is_class:
            return await _answer(runtime, one, one.method.function)
        values, owner = _values(one), runtime.instances_of(one.service)
        loaded = owner.take(values) or await _loaded(owner, values)
        try:
            bound: Callable[..., Any] = getattr(owner.view(loaded, values), one.method.name)
            key, using = loaded.batch_key(values), functools.partial(owner.using, loaded)
            return await _answer(runtime, one, bound, key=key, using=using)
        finally:
            owner.give_back(loaded)
    finally:
        execution.batch.reset(batch)
        batch_items.held.reset(held)


async def _loaded(owner: instances.Instances, values: ParameterValues) -> instances.Loaded:
    joining = batch_items.joining.get()
    if joining is not None:
        # Before it joins a batch: limits bound the wait, and a load can kill the process.
        joining.begin()
    return await owner.load(values)


def _run_sync(runtime: in_process.Process, one: Input) -> Any:
    use = instances.Use(runtime.instances_of(one.service), _values(one))
    try:
        if not use.take():
            _wait_within_limits(runtime, one, use.load())
        bound: Callable[..., Any] = getattr(use.view(), one.method.name)
        args, kwargs = batch_items.of_one_input(one.method, one.args, one.kwargs)
        return batch_items.only_answer(one.method, _contained(runtime, bound, *args, **kwargs))
    finally:
        use.end()


def _wait_within_limits(
    runtime: in_process.Process, one: Input, work: Coroutine[Any, Any, None]
) -> None:
    """Wait for the loop as part of the input: what stops the input ends the wait."""
    if runtime.is_on_loop():
        greenlet_bridge.drive(work)
    else:
        running.run(runtime, one, work)


async def _answer(
    runtime: in_process.Process,
    one: Input,
    fn: Callable[..., Any],
    *,
    key: Hashable = None,
    using: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    if one.method.batched is not None and runtime.batchers is not None:
        batcher = runtime.batchers.of(one.service, one.method)
        return await batcher.submit(fn, one.args, one.kwargs, key=key, using=using)
    args, kwargs = batch_items.of_one_input(one.method, one.args, one.kwargs)
    if one.method.is_async:
        with body_guard.Contained(runtime.is_ending):
            answer = await fn(*args, **kwargs)
    else:  # it must not stop the loop that it shares with the body that awaits it
        answer = await asyncio.to_thread(_threaded, runtime, fn, *args, **kwargs)
    return batch_items.only_answer(one.method, answer)


def _contained(
    runtime: in_process.Process, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    with body_guard.Contained(runtime.is_ending):
        return fn(*args, **kwargs)


def _threaded(
    runtime: in_process.Process, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    try:
        return _contained(runtime, fn, *args, **kwargs)
    except StopIteration as exc:  # cannot cross a future; a coroutine raises the same
        raise RuntimeError(f"the body raised {exc!r}") from exc


def _values(one: Input) -> dict[str, Any]:
    return parameters.complete(one.service.parameters, one.given)


class _Limits:
    """The time limits of one call, as timers that another thread sets and cancels."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, call: greenlet_bridge.Call[Any], one: Input
    ) -> None:
        self._loop = loop
        self._call = call
        self._handles: list[asyncio.TimerHandle] = []
        loop.call_soon_threadsafe(self._arm, one)

    def disarm(self) -> None:
        self._loop.call_soon_threadsafe(self._cancel)

    def _arm(self, one: Input) -> None:
        if one.soft_limit:
            soft = SoftTimeLimitExceeded(one.soft_limit)
            self._handles.append(self._loop.call_later(one.soft_limit, self._call.interrupt, soft))
        if one.hard_limit:
            hard = execution.HardLimit(one.hard_limit)
            self._handles.append(self._loop.call_later(one.hard_limit, self._call.abandon, hard))

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()
