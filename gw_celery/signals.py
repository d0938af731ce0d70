"""The Celery signals by which a worker learns what to load, and loads it.

``worker_init`` comes once in the worker's parent, after its options are known and before its pool
is made; ``worker_process_init`` and ``worker_process_shutdown`` come in each child of prefork, and
in the one process of solo. The threads pool sends neither: a bootstep does its part.
"""

from __future__ import annotations

import contextlib
from typing import Any

from celery import signals

from gw_celery.declare import registry
from gw_celery.runtime import fatal_exit
from gw_celery.worker import forks, serving

_registries: list[registry.Registry] = []
#: What this worker serves; set in the parent, inherited by forked children.
_plan: serving.Plan | None = None


def connect(declared: registry.Registry) -> None:
    """Add an App's declarations and connect the receivers, once per process."""
    _registries.append(declared)
    listen()


def listen() -> None:
    """Connect the receivers, once per process; the pool does it where there is no App."""
    signals.worker_init.connect(_on_worker_init, dispatch_uid="gw_celery.worker_init")
    signals.worker_process_init.connect(_on_process_init, dispatch_uid="gw_celery.process_init")
    signals.worker_process_shutdown.connect(_on_shutdown, dispatch_uid="gw_celery.process_shutdown")
    signals.worker_shutdown.connect(_on_shutdown, dispatch_uid="gw_celery.shutdown")


def registries() -> tuple[registry.Registry, ...]:
    """Return the declarations of every App of this process."""
    return tuple(_registries)


def plan() -> serving.Plan | None:
    """Return what the worker of this process serves; ``None`` before it starts, or elsewhere."""
    return _plan


def _on_worker_init(sender: Any, **_: Any) -> None:
    global _plan
    # Celery swallows an Exception of a receiver and would start all the same.
    with fatal_exit.fatal_errors(lambda reason: _note(sender, reason)):
        # Here, because it imports Celery's worker: every client imports this module.
        from gw_celery.worker import startup

        _plan = startup.prepare(sender, registries())


def _note(worker: Any, reason: str) -> None:
    """Leave the reason in the worker's log, which is not set up yet: detached, it has no other."""
    if isinstance(path := getattr(worker, "logfile", None), str) and "%" not in path:
        with contextlib.suppress(OSError), open(path, "a") as log:
            log.write(f"gw_celery: {reason}\n")


def _on_process_init(**_: Any) -> None:
    if _plan is not None and (pipes := _plan.pipes) is not None:
        with fatal_exit.fatal_errors(pipes.report), pipes.stop_check() as check:
            if _plan.pool == "prefork":
                forks.refuse_cuda()
            serving.start(_plan, check)


def _on_shutdown(**_: Any) -> None:
    serving.stop()
