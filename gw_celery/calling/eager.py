"""Serve in this very process: eager mode, ``.local()`` and tests."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from celery import _state

from gw_celery import conf
from gw_celery.declare import registry, services
from gw_celery.runtime import identity, process

_making = threading.Lock()
_flagging = threading.Lock()
#: Eager calls under way, and what Celery's flag was before the first of them.
_under_way: list[bool] = []


def serving(app: Any, declared: registry.Registry, service: services.Service) -> process.Process:
    """Return a process runtime in which ``service`` is entered, starting it at the first use.

    Raises:
        StartupError: when a context or hook fails; the next call tries again.
    """
    runtime = started(app)
    if not runtime.serves(service.key):
        runtime.enter([declared], [service])
    return runtime


def started(app: Any) -> process.Process:
    """Return this process's runtime, starting an empty one when there is none."""
    with _making:
        runtime = process.current()
        if runtime is None:
            runtime = process.Process(conf.read(app.conf))
            runtime.start()
            # Celery's current app is the thread's: bodies call tasks that are bound lazily.
            runtime.loop.call_soon_threadsafe(app.set_current)
            process.adopt(runtime)
            atexit.register(stop, runtime)
        return runtime


def stop(runtime: process.Process) -> None:
    """Leave everything that ``runtime`` entered, once."""
    if process.current() is runtime:
        process.adopt(None)
        atexit.unregister(stop)
        runtime.stop()


def apart(send: Callable[..., Any], *args: Any) -> Any:
    """Call ``send`` in a thread as a caller of its own: bodies at once need stacks of their own."""
    parent = _state.get_current_task()
    request = None if parent is None else parent.request_stack.top
    identity.follow_none()
    if parent is None or request is None:
        return send(*args)
    # Celery takes the parent of an eager call from the stacks of the thread that makes it.
    _state._task_stack.push(parent)
    parent.request_stack.push(request)
    try:
        return send(*args)
    finally:
        parent.request_stack.pop()
        _state._task_stack.pop()


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
