"""Calls that the process which makes them serves by itself: those of its bodies, and eager ones.

``await task(x)`` in a body runs the other body as part of that one. Celery's wrappers around
``run`` are synchronous and belong to its tracer, which has no share in such a call. Converting
pydantic models is the one of them that changes what the caller gets.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import _state
from celery.app.base import pydantic_wrapper

from gw_celery import errors
from gw_celery.client import task_context
from gw_celery.declare import services
from gw_celery.runtime import batch_items, body, greenlet_bridge

if TYPE_CHECKING:
    from gw_celery.runtime import in_process


def can_run(runtime: in_process.Process, task: Any) -> bool:
    """Whether this is a body's loop, with the service loaded and not held by the caller.

    A batched method takes no slot: a body may await one of its own service.

    Raises:
        UsageError: when a batch would wait for another one of its service, which waits for it.
    """
    key = task.gw_service.key
    if not (runtime.is_on_loop() and runtime.serves(key)):
        return False
    gathers = task.gw_method.batched is not None and runtime.batchers is not None
    if key not in batch_items.held.get():
        return True
    if gathers and batch_items.is_in_batch.get():
        raise errors.UsageError(
            f"{task.name} is awaited in a batch of its own service, and would wait for that batch "
            f"to end: call self.{task.gw_method.name}(...) with lists, or await it before"
        )
    return gathers


async def run(
    runtime: in_process.Process,
    task: Any,
    options: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the body with the ``options`` of the call and return its answer."""
    task.check_arguments(args, kwargs)
    if task.gw_method.is_bound:
        args = (task, *args)
    sent = options.get("headers")
    if not task.gw_method.options.get("pydantic"):
        return await body.run_async(runtime, body.Call.of(task, sent, args, kwargs))
    validate, dump = _pydantic(task)
    args, kwargs = validate(*args, **kwargs)
    return dump(await body.run_async(runtime, body.Call.of(task, sent, args, kwargs)))


async def call_eagerly(runtime: in_process.Process, task: Any, send: Callable[[], Any]) -> Any:
    """Call ``send`` as a caller of its own: bodies that run at once need stacks of their own.

    Inputs that gather need each other, and there may be more of them than threads: these wait in
    greenlets on the loop of the process, as in a replica.
    """
    child = functools.partial(_as_child, *_caller(), send)
    gathers = runtime.batchers is not None and task.gw_method.batched is not None
    if not (gathers and greenlet_bridge.runs_on_loop(task)):
        return await asyncio.to_thread(child)
    stepped = greenlet_bridge.step(child)
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(stepped, runtime.loop))


def _caller() -> tuple[Any, Any]:
    """The task that makes a call, and its request; ``None`` where no task does."""
    parent = _state.get_current_task()
    return parent, None if parent is None else parent.request_stack.top


def _as_child(parent: Any, request: Any, send: Callable[[], Any]) -> Any:
    own = task_context.bind()
    try:
        if request is None:
            return send()
        # Celery takes the parent of an eager call from the stacks of whoever makes it.
        _state._task_stack.push(parent)
        parent.request_stack.push(request)
        try:
            return send()
        finally:
            parent.request_stack.pop()
            _state._task_stack.pop()
    finally:
        own.end()


@functools.cache
def _pydantic(task: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Celery's own conversion of the arguments, and of the answer."""
    method: services.Method = task.gw_method
    signature = services.full_signature(method) if method.is_bound else method.signature
    answer = inspect.Parameter("_gw_answer", inspect.Parameter.POSITIONAL_ONLY)
    return (
        _wrapped(task, lambda *args, **kwargs: (args, kwargs), signature),
        _wrapped(task, lambda answer: answer, signature.replace(parameters=[answer])),
    )


def _wrapped(task: Any, fn: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """Wrap ``fn`` as Celery wraps the body: the annotations are the body's."""
    fn = functools.wraps(task.gw_method.function)(fn)
    fn.__signature__ = signature  # type: ignore[attr-defined]
    options = task.gw_method.options
    wrapped: Callable[..., Any] = pydantic_wrapper(
        task.app,
        fn,
        task.name,
        options.get("pydantic_strict", False),
        options.get("pydantic_context"),
        options.get("pydantic_dump_kwargs"),
    )
    return wrapped
