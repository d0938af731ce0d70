"""Receivers of the Celery signals on which a worker plans and loads what it serves.

``worker_init`` runs once in the worker's parent, after its options are known and before its pool
exists. ``worker_process_init`` and ``worker_process_shutdown`` run in each prefork child, and in
the single process of solo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import signals

from gw_celery.client import execution
from gw_celery.declare import registry

if TYPE_CHECKING:
    from gw_celery.worker.plan import Plan

_registries: list[registry.Registry] = []
#: What this worker serves: set in the parent, and inherited by forked children.
_plan: Plan | None = None


def connect(declared: registry.Registry) -> None:
    """Add an App's declarations, and connect the receivers once per process."""
    _registries.append(declared)
    listen()


def listen() -> None:
    """Connect the receivers once per process; the pool calls this for a worker without an App."""
    signals.worker_init.connect(_on_worker_init, dispatch_uid="gw_celery.worker_init")
    signals.worker_process_init.connect(_on_process_init, dispatch_uid="gw_celery.process_init")
    signals.worker_process_shutdown.connect(_on_shutdown, dispatch_uid="gw_celery.process_shutdown")
    signals.worker_shutdown.connect(_on_shutdown, dispatch_uid="gw_celery.shutdown")


def registries() -> tuple[registry.Registry, ...]:
    """Return the declarations of every App of this process."""
    return tuple(_registries)


def plan() -> Plan | None:
    """Return what this worker serves; ``None`` before it starts, and in other processes."""
    return _plan


def _on_worker_init(sender: Any, **_: Any) -> None:
    global _plan
    from gw_celery.worker import startup  # late: it imports Celery's worker

    _plan = startup.prepare_or_exit(sender, registries())


def _on_process_init(**_: Any) -> None:
    if _plan is not None and _plan.pipes is not None:
        from gw_celery.worker import serving

        serving.load_or_exit(_plan, _plan.pipes)


def _on_shutdown(**_: Any) -> None:
    execution.stop()
