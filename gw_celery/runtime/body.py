"""Run the body of one input: find its instance, wrap what is batched, enforce its limits."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Coroutine, Hashable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from celery.exceptions import SoftTimeLimitExceeded

from gw_celery.declare import parameters, services
from gw_celery.runtime import (
    batch_items,
    body_guard,
    greenlet_bridge,
    in_process,
    instances,
)
from gw_celery.runtime import current_batch as current
from gw_celery.types import ParameterValues

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


class HardLimit(body_guard.Stopped):
    """The hard time limit of an input passed."""


class Revoked(body_guard.Stopped):
    """The input was revoked while it ran."""


class Running:
    """The calls that run in this process, by task id."""

    def __init__(self) -> None:
        self._calls: dict[str, greenlet_bridge.Call[Any]] = {}
        #: Revoked on their way from the worker to here, which takes a moment: no more than a few.
        self._revoked_early: collections.deque[str] = collections.deque(maxlen=100)
        self._changing = threading.Lock()

    def run(self, runtime: in_process.Process, one: Input, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` of an input on the loop, for a thread that waits, within its limits."""
        call = runtime.call(work)
        if self._is_revoked_as_added(one.task_id, call):
            call.abandon(Revoked())
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
            call.abandon(Revoked())
        else:
            call.interrupt(exc)
        return True

    def revoke(self, task_id: str) -> None:
        """Stop an input that runs or is about to."""
        with self._changing:
            call = self._calls.get(task_id)
            if call is None:
                self._revoked_early.append(task_id)
        if call is not None:
            call.abandon(Revoked())

    def _is_revoked_as_added(self, task_id: str, call: greenlet_bridge.Call[Any]) -> bool:
        with self._changing:
            self._calls[task_id] = call
            return task_id in self._revoked_early


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
    token = current.held.set(current.held.get() | {one.service.key})
    batch = current.batch.set(None)
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
        current.batch.reset(batch)
        current.held.reset(token)


async def _loaded(owner: instances.Instances, values: ParameterValues) -> instances.Loaded:
    joining = current.joining.get()
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
            limit = SoftTimeLimitExceeded(one.soft_limit)
            self._handles.append(self._loop.call_later(one.soft_limit, self._call.interrupt, limit))
        if one.hard_limit:
            self._handles.append(
                self._loop.call_later(one.hard_limit, self._call.abandon, HardLimit(one.hard_limit))
            )

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()
