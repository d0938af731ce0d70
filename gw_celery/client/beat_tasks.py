"""What Celery's beat sends: two tasks that have every worker look for what is due at one time.

Nothing depends on them: a worker runs its probes and benchmarks by its own clock as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import celery
from celery import _state

from gw_celery import conf, errors
from gw_celery.declare import registry

logger = logging.getLogger(__name__)

#: The queue of both; consumed by each worker with the GPU pool that has probes or benchmarks.
QUEUE = "gw.control"
PROBE = "gw_celery.probe_sweep"
BENCHMARK = "gw_celery.benchmark_sweep"
#: The control command that each of them broadcasts.
COMMANDS = {PROBE: "gw_probe_tick", BENCHMARK: "gw_benchmark_tick"}


class Sweep(celery.Task):
    """A task that beat sends; ``expires`` is its period, so that no tick is made up for.

    The options are here because django-celery-beat keeps no others of an entry than its own, and
    in a base class because Celery warns of a ``queue`` in the class of a task.
    """

    queue = QUEUE
    ignore_result = True


def broadcast(task: Any) -> None:
    """Tell every worker with the GPU pool that it is time."""
    task.app.control.broadcast(COMMANDS[task.name], reply=False)


def join(celery_app: Any, registries: Callable[[], Iterable[registry.Registry]]) -> None:
    """Give the tasks to a Celery app; without one to all of this process, as ``shared_task`` does.

    Args:
        celery_app: the app, or ``None``.
        registries: returns the declarations of every App, once they are all made.
    """

    def add(app: Any) -> None:
        for name in COMMANDS:
            app.task(name=name, base=Sweep, bind=True, shared=False)(broadcast)
        app.on_after_finalize.connect(
            lambda sender, **_: schedule(sender, registries()),
            weak=False,
            dispatch_uid="gw_celery.beat_tasks",
        )

    if celery_app is not None:
        add(celery_app)
        return
    for app in list(_state._get_active_apps()):
        if app.finalized:
            add(app)
    _state.connect_on_app_finalize(add)


def schedule(app: Any, registries: Iterable[registry.Registry]) -> None:
    """Give ``beat_schedule`` of a finalized app the entries that it needs."""
    declared = [one for one in registries if app in one.celery_apps]
    services = [service for one in declared for service in one.services.values()]
    probes = [probe.period_s for service in services for probe in service.probes]
    methods = [method for service in services for method in service.methods.values()]
    try:
        settings = conf.read(app.conf)
    except errors.ConfigurationError as exc:
        # Raised here, Celery would swallow it; a worker refuses to start with it.
        logger.error("beat_schedule gets no entries of ours: %s", exc)
        return
    if settings.probe_period and probes:
        _add_entry(app, PROBE, min(settings.probe_period, *probes))
    if settings.benchmark_period and any(method.benchmark for method in methods):
        _add_entry(app, BENCHMARK, settings.benchmark_period)


def _add_entry(app: Any, name: str, period: float) -> None:
    """Add an entry, or change ours; one of this name that the user wrote stays."""
    task, entries = app.tasks[name], dict(app.conf.beat_schedule or {})
    ours = {"task": name, "schedule": task.expires}
    task.expires = max(1, int(period))
    if entries.get(name, ours) == ours:
        entries[name] = {"task": name, "schedule": task.expires}
        conf.assign(app.conf, "beat_schedule", entries)
