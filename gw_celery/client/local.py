"""Serve in this very process: eager mode, ``.local()`` and tests."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from celery import _state

from gw_celery import conf
from gw_celery.client import together
from gw_celery.declare import registry, services
from gw_celery.runtime import greenlet_bridge, in_process, task_context

_making = threading.Lock()
_flagging = threading.Lock()
#: Eager calls under way, and what Celery's flag was before the first of them.
_under_way: list[bool] = []


def serving(app: Any, declared: registry.Registry, service: services.Service) -> in_process.Process:
    """Return a process runtime in which ``service`` is entered, starting it at the first use.

    Raises:
        StartupError: when a context or hook fails; the next call tries again.
    """
    runtime = started(app)
    if not runtime.serves(service.key):
        runtime.enter([declared], [service])
    return runtime


def started(app: Any) -> in_process.Process:
    """Return this process's runtime, starting an empty one when there is none."""
    with _making:
        runtime = in_process.current()
        if runtime is None:
            runtime = in_process.Process(conf.read(app.conf))
            runtime.start()
            # Celery's current app is the thread's: bodies call tasks that are bound lazily.
            runtime.loop.call_soon_threadsafe(app.set_current)
            in_process.adopt(runtime)
            atexit.register(stop, runtime)
        return runtime


def stop(runtime: in_process.Process) -> None:
    """Leave everything that ``runtime`` entered, once."""
    if in_process.current() is runtime:
        in_process.adopt(None)
        atexit.unregister(stop)
        runtime.stop()


async def apart(task: Any, send: Callable[[], Any]) -> Any:
    """Call ``send`` as a caller of its own: bodies at once need stacks of their own.

    Inputs that gather need each other, more of them than there are threads, so that these wait in
    greenlets on the loop of the process, as in a replica.
    """
    child = functools.partial(_as_child, *_caller(), send)
    runtime = in_process.current()
    if runtime is None or runtime.batchers is None or not _gathers(task):
        return await asyncio.to_thread(child)
    return await together.run(
        runtime.loop, lambda: greenlet_bridge.step(child, greenlet_bridge.NOBODY)
    )


def _gathers(task: Any) -> bool:
    # Here: only processes that serve need it.
    from gw_celery.replica import tracer

    return task.gw_method.batched is not None and tracer.runs_on_loop(task)


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


@contextlib.contextmanager
def own_join_flag() -> Iterator[None]:
    """Put back Celery's flag against joining results in tasks, which is one for all threads.

    Celery saves and restores it around each eager call: when two overlap, it would stay set.
    """
    with _flagging:
        _under_way.append(_under_way[0] if _under_way else _state.task_join_will_block())
    try:
        yield
    finally:
        with _flagging:
            before = _under_way.pop()
            if not _under_way:
                _state._set_task_join_will_block(before)
