"""Serve in this very process: eager mode, ``.local()`` and tests."""

from __future__ import annotations

import atexit
import threading
from typing import Any

from gw_celery import conf
from gw_celery.declare import registry, services
from gw_celery.runtime import process

_making = threading.Lock()


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
            process.adopt(runtime)
            atexit.register(stop, runtime)
        return runtime


def stop(runtime: process.Process) -> None:
    """Leave everything that ``runtime`` entered, once."""
    if process.current() is runtime:
        process.adopt(None)
        atexit.unregister(stop)
        runtime.stop()
