"""The two tasks that Celery's beat sends so that all workers probe or benchmark at the same time.

Beat and every worker load it. Workers also probe and benchmark by their own clocks, without beat.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery, Task
from kombu.entity import Exchange, Queue

from gw_celery import conf, errors, signals
from gw_celery.client import task

logger = logging.getLogger(__name__)

#: Queue of both tasks. Each worker with the GPU pool that has probes or benchmarks consumes it.
QUEUE = "gw.control"
PROBE = "gw_celery.probe_sweep"
BENCHMARK = "gw_celery.benchmark_sweep"
#: The control command that each task broadcasts.
COMMANDS = {PROBE: "gw_probe_tick", BENCHMARK: "gw_benchmark_tick"}


class Sweep(Task):
    """A task that beat sends. It expires after its period, so that late ticks do not pile up.

    The options belong to the task because django-celery-beat drops them from an entry. They are in
    a base class because Celery warns of a ``queue`` in a task's own class.
    """

    queue = QUEUE
    ignore_result = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        add_queue(self.app)
        return super().apply_async(*args, **options)


def add_queue(app: Celery) -> None:
    """Add the queue of both tasks to ``app``, unless the project names its queues itself.

    The queue gets no priorities or type from the app's defaults, because RabbitMQ refuses a queue
    that another process has declared with different arguments.
    """
    queues, named = app.amqp.queues, app.conf.task_queues or ()
    if queues.create_missing and QUEUE not in {getattr(entry, "name", entry) for entry in named}:
        queue: Any = Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)
        queues[QUEUE] = queue
        queue.queue_arguments = None  # adding it has set the app's defaults


def broadcast(sweep: Any) -> None:
    """Tell every worker with the GPU pool to run what is due."""
    sweep.app.control.broadcast(COMMANDS[sweep.name], reply=False)


def join(celery_app: Celery | None) -> None:
    """Add the tasks to a Celery app; ``None`` means every app of the process, as ``shared_task``.

    Each app gets its entries of ``beat_schedule`` when it is finalized.
    """
    if celery_app is not None:
        _add_tasks(celery_app)
    else:
        task.for_every_app(_add_tasks)


def _add_tasks(app: Celery) -> None:
    for name in COMMANDS:
        app.task(name=name, base=Sweep, bind=True, shared=False)(broadcast)
    app.on_after_finalize.connect(schedule, dispatch_uid="gw_celery.beat_tasks")


def schedule(sender: Any, **_: Any) -> None:
    """Add the entries that the finalized app ``sender`` needs to its ``beat_schedule``."""
    services = [
        service
        for declared in signals.registries()
        if sender in declared.celery_apps
        for service in declared.services.values()
    ]
    probes = [probe.period_s for service in services for probe in service.probes]
    methods = [method for service in services for method in service.methods.values()]
    try:
        settings = conf.read(sender.conf)
    except errors.ConfigurationError as exc:
        # Celery swallows an exception raised here; a worker refuses to start with this setting.
        logger.error("beat_schedule has no entries of gw_celery: %s", exc)
        return
    if settings.probe_period and probes:
        _add_entry(sender, PROBE, min(settings.probe_period, *probes))
    if settings.benchmark_period and any(method.benchmark for method in methods):
        _add_entry(sender, BENCHMARK, settings.benchmark_period)


def _add_entry(app: Any, name: str, period: float) -> None:
    """Add or update our entry; keep an entry that the user wrote under the same name."""
    sweep, entries = app.tasks[name], dict(app.conf.beat_schedule or {})
    ours = {"task": name, "schedule": sweep.expires}
    sweep.expires = max(1, int(period))
    if entries.get(name, ours) == ours:
        entries[name] = {"task": name, "schedule": sweep.expires}
        conf.assign(app.conf, "beat_schedule", entries)
