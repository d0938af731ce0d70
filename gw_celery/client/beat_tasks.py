"""What Celery's beat sends: two tasks that have every worker look for what is due at one time.

Nothing depends on them: a worker runs its probes and benchmarks by its own clock as well.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery, Task
from kombu.entity import Exchange, Queue

from gw_celery import conf, errors, signals
from gw_celery.client import task

logger = logging.getLogger(__name__)

#: The queue of both; consumed by each worker with the GPU pool that has probes or benchmarks.
QUEUE = "gw.control"
PROBE = "gw_celery.probe_sweep"
BENCHMARK = "gw_celery.benchmark_sweep"
#: The control command that each of them broadcasts.
COMMANDS = {PROBE: "gw_probe_tick", BENCHMARK: "gw_benchmark_tick"}


class Sweep(Task):
    """A task that beat sends; ``expires`` is its period, so that no tick is made up for.

    The options are here because django-celery-beat keeps no others of an entry than its own, and
    in a base class because Celery warns of a ``queue`` in the class of a task.
    """

    queue = QUEUE
    ignore_result = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Send it, as any task, to the queue that workers consume."""
        add_queue(self.app)
        return super().apply_async(*args, **options)


def add_queue(app: Celery) -> None:
    """Add the queue of both to those of ``app``, unless the project names or must name it itself.

    RabbitMQ refuses a queue that another process declared otherwise, so that no priorities or queue
    types that an app gives to its missing queues are for this one.
    """
    queues, named = app.amqp.queues, app.conf.task_queues or ()
    if queues.create_missing and QUEUE not in {getattr(entry, "name", entry) for entry in named}:
        queue: Any = Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)
        queues[QUEUE] = queue
        queue.queue_arguments = None  # it has just been given the app's


def broadcast(sweep: Any) -> None:
    """Tell every worker with the GPU pool that it is time."""
    sweep.app.control.broadcast(COMMANDS[sweep.name], reply=False)


def join(celery_app: Celery | None) -> None:
    """Give the tasks to a Celery app; without one to all of this process, as ``shared_task`` does.

    Each app gets its entries of ``beat_schedule`` once every App is made.
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
    """Give ``beat_schedule`` of the finalized app ``sender`` the entries that it needs."""
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
        # Raised here, Celery would swallow it; a worker refuses to start with it.
        logger.error("beat_schedule has no entries of gw_celery: %s", exc)
        return
    if settings.probe_period and probes:
        _add_entry(sender, PROBE, min(settings.probe_period, *probes))
    if settings.benchmark_period and any(method.benchmark for method in methods):
        _add_entry(sender, BENCHMARK, settings.benchmark_period)


def _add_entry(app: Any, name: str, period: float) -> None:
    """Add an entry, or change ours; one of this name that the user wrote stays."""
    sweep, entries = app.tasks[name], dict(app.conf.beat_schedule or {})
    ours = {"task": name, "schedule": sweep.expires}
    sweep.expires = max(1, int(period))
    if entries.get(name, ours) == ours:
        entries[name] = {"task": name, "schedule": sweep.expires}
        conf.assign(app.conf, "beat_schedule", entries)
