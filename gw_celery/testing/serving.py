"""Serve an App in the process of its test, as a replica would, without a broker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gw_celery.client import execution
from gw_celery.runtime import batcher
from gw_celery.runtime import in_process as runtime_in_process

if TYPE_CHECKING:
    from gw_celery.app import App


@contextlib.contextmanager
def in_process(app: App, *, clock: batcher.Clock | None = None) -> Iterator[None]:
    """Serve everything that ``app`` declares in this process until the block ends.

    Contexts and ``on_enter`` hooks are entered now and left at the end, of the outermost block
    where several Apps are served. Inside, ``.delay()``, ``.remote()``, ``await`` and canvas run
    the bodies here, through the same serializer; inputs of batched methods gather as in a replica.

    Args:
        clock: by which they wait for each other; the machine's own unless one is given.

    Raises:
        StartupError: when a context or hook fails, with every cause.
    """
    conf = app.celery.conf
    is_outermost = execution.current() is None
    runtime = runtime_in_process.started(app.celery)
    before = conf.task_always_eager, runtime.batchers
    conf.task_always_eager = True
    if runtime.batchers is None or clock is not None:
        runtime.batchers = batcher.Batchers(clock=clock or batcher.Clock())
    try:
        runtime.enter([app.registry], list(app.registry.services.values()))
        yield
    finally:
        conf.task_always_eager, runtime.batchers = before
        if is_outermost:
            execution.stop()
