"""``await task(x)`` in a body of the process that serves it: the body runs here, as part of that.

Celery's wrappers around ``run`` are synchronous and belong to its tracer, which has no share in
such a call. Converting pydantic models is the one of them that changes what the caller gets.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from celery.app.base import pydantic_wrapper

from gw_celery import errors
from gw_celery.declare import services
from gw_celery.runtime import body, current_batch, in_process


def can_run(task: Any, runtime: in_process.Process) -> bool:
    """Whether this is a body's loop, with the service loaded and not held by the caller.

    A batched method takes no slot: a body may await one of its own service.

    Raises:
        UsageError: when a batch would wait for another one of its service, which waits for it.
    """
    key = task.gw_service.key
    if not (runtime.is_on_loop() and runtime.serves(key)):
        return False
    gathers = task.gw_method.batched is not None and runtime.batchers is not None
    if key not in current_batch.held.get():
        return True
    if gathers and current_batch.is_in_batch.get():
        raise errors.UsageError(
            f"{task.name} is awaited in a batch of its own service, and would wait for that batch "
            f"to end: call self.{task.gw_method.name}(...) with lists, or await it before"
        )
    return gathers


async def run(
    task: Any,
    runtime: in_process.Process,
    given: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the body with the options ``given`` and return its answer."""
    task.check_arguments(args, kwargs)
    if task.gw_method.is_bound:
        args = (task, *args)
    if not task.gw_method.options.get("pydantic"):
        return await body.run_async(runtime, task.input_for(given, args, kwargs))
    validate, dump = _pydantic(task)
    args, kwargs = validate(*args, **kwargs)
    return dump(await body.run_async(runtime, task.input_for(given, args, kwargs)))


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
