"""Decide, when a worker starts, what it serves; refuse what cannot work.

Celery logs a failed check and goes on, so that the checks here end the process themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from celery import concurrency

from gw_celery import conf, errors
from gw_celery.client import beat_tasks, preset, registration
from gw_celery.declare import gpu, registry, services
from gw_celery.runtime import lifecycle
from gw_celery.worker import (
    bootsteps,
    commands,
    compression,
    forks,
    gate,
    options,
    serving,
    sizing,
    start_notices,
)
from gw_celery.worker.pipes import Pipes

logger = logging.getLogger(__name__)

#: For workers with the GPU pool: Celery's own starts a replica for every few messages that wait.
AUTOSCALER = "gw_celery.autoscale:Autoscaler"
_POOLS = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.solo": "solo",
    "celery.concurrency.thread": "threads",
    "gw_celery.pool": serving.GPU_POOL,
    "gw_celery.pool.taskpool": serving.GPU_POOL,
}
#: Celery's own that serve: it sends ``worker_process_init`` in their processes.
_SERVING = ("prefork", "solo")
#: Why others do not, where it is not what keeps the green ones from it.
_REASONS = {"threads": "a limit or a revocation cannot stop the body of a thread"}


def prepare_or_exit(worker: Any, registries: Sequence[registry.Registry]) -> serving.Plan:
    """As ``prepare``; what it raises ends the process: Celery would log it and start all the same.

    Raises:
        SystemExit: with the reason in the log.
    """
    with lifecycle.fatal_errors(lambda reason: _note(worker, reason)):
        return prepare(worker, registries)


def load_or_exit(plan: serving.Plan, pipes: Pipes) -> None:
    """Enter what ``plan`` serves in this process of prefork or solo, before its first task.

    Raises:
        SystemExit: when something fails; the worker learns the reason, and stops.
    """
    with lifecycle.fatal_errors(pipes.report), pipes.stop_check() as check:
        if plan.pool == "prefork":
            forks.refuse_cuda()
        serving.start(plan, check)


def _note(worker: Any, reason: str) -> None:
    """Leave the reason in the worker's log, which is not set up yet: detached, it has no other."""
    if isinstance(path := getattr(worker, "logfile", None), str) and "%" not in path:
        with contextlib.suppress(OSError), open(path, "a") as log:
            log.write(f"gw_celery: {reason}\n")


def prepare(worker: Any, registries: Sequence[registry.Registry]) -> serving.Plan:
    """Choose and expand families, check the configuration, and return what ``worker`` serves.

    Raises:
        ConfigurationError: for settings that contradict each other or the pool, for a GPU that is
            needed and not there, and where CUDA is up in a process that the pool would fork.
        DeclarationError: for a service and a plain task of the same name.
    """
    app, queues = worker.app, worker.app.amqp.queues
    settings = conf.read(app.conf)
    preset.configure_codec(settings)
    registries = [declared for declared in registries if _belongs(declared, app)]
    preset.require_visibility(app, registries)
    typed: options.WorkerOptions | None = worker.options.pop(options.KEY, None)
    if typed is not None:
        sizing.select_families(worker, typed, registries, settings)
    expand_families(queues, registries)
    if beat_tasks.QUEUE in queues.consume_from:
        _consume_ticks(app)
    commands.install_ticks()
    served = list(registry.serving(registries, queues.consume_from))
    pool = _pool_name(worker.pool_cls)
    plan = serving.Plan(
        registries=registries,
        served=served,
        settings=settings,
        pool=pool,
        queues=tuple(name for name in queues.consume_from if name != beat_tasks.QUEUE),
        pipes=Pipes() if served and pool in _SERVING else None,
    )
    if served:
        _require_supported(pool, served)
        # A process that is spawned shares nothing with this one.
        if pool == "prefork" and getattr(worker, "pool_start_method", "fork") == "fork":
            forks.refuse_cuda()
        preset.require_content(app)
        tune_worker(worker, settings)
        commands.guard_queues(plan)
    if served or pool == serving.GPU_POOL:
        compression.bound(settings.max_payload_bytes)
    if pool == serving.GPU_POOL:
        return _prepare_gpu_pool(worker, plan, typed)
    if served or start_notices.strays(plan):
        app.steps["worker"].update((bootsteps.ServingStep, bootsteps.ChildrenStep))
    return plan


def _prepare_gpu_pool(
    worker: Any, plan: serving.Plan, typed: options.WorkerOptions | None
) -> serving.Plan:
    plan = dataclasses.replace(plan, allotment=sizing.allot(plan))
    plan = dataclasses.replace(plan, has_declared_bounds=sizing.fit(worker, plan, typed))
    commands.guard_size()
    commands.install()
    # The gate owns the prefetch count, and sets it anew at every connection.
    worker.app.conf.worker_enable_prefetch_count_reduction = False
    if not conf.is_set(worker.app.conf, "worker_autoscaler"):
        worker.autoscaler_cls = AUTOSCALER
    worker.consumer_cls = "gw_celery.worker.consumer:Consumer"
    worker.app.steps["worker"].add(bootsteps.ScalingStep)
    worker.app.steps["consumer"].add(gate.GateStep)
    if plan.probes or any(plan.benchmarked.values()):
        _consume_ticks(worker.app)
    return plan


def _consume_ticks(app: Any) -> None:
    """Consume the queue of beat's tasks, whatever ``-Q`` names."""
    beat_tasks.add_queue(app)
    queues = app.amqp.queues
    try:
        queues.consume_from[beat_tasks.QUEUE] = queues[beat_tasks.QUEUE]
    except KeyError:
        logger.warning(
            "task_queues lacks %s and task_create_missing_queues is off: this worker runs none of "
            "beat's tasks",
            beat_tasks.QUEUE,
        )


def tune_worker(worker: Any, settings: conf.Settings) -> None:
    """Set what a worker that loads models needs, for this worker only."""
    app = worker.app
    # A replacement child of prefork is killed when it is not up in this time: 4 s by default.
    app.conf.worker_proc_alive_timeout = max(
        app.conf.worker_proc_alive_timeout, settings.start_timeout + 30
    )
    app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
    # ``--prefetch-multiplier`` with the default looks like none.
    is_default = worker.prefetch_multiplier == app.conf.worker_prefetch_multiplier
    if is_default and not conf.is_set(app.conf, "worker_prefetch_multiplier"):
        worker.prefetch_multiplier = 1


def expand_families(queues: Any, registries: Sequence[registry.Registry]) -> None:
    """Replace the name of a family among the consumed queues by its service queues.

    Raises:
        ConfigurationError: for a dotted family or service queue that no service belongs to; a
            plain ``cpu`` or ``gpu`` may be a queue of the project's own.
    """
    families = registry.families(registries)
    served = {queue for listed in families.values() for queue in listed}
    for name in [queue for queue in queues.consume_from if queue not in served]:
        if name in families:
            queues.deselect(name)
            for queue in families[name]:
                # The queue that a client makes of this name, with its type and priorities.
                queues.select_add(queues[queue])
        elif "." in name and gpu.is_family(name):  # a project's own may be named just "cpu"
            here = ", ".join(sorted(families)) or "none: is the module that declares them imported"
            raise errors.ConfigurationError(
                f"-Q {name}: no service belongs to this family or queue; families here: {here}"
            )


def _belongs(declared: registry.Registry, app: Any) -> bool:
    """By the names of its tasks: a spawned child has copies of both.

    Raises:
        DeclarationError: for a name, declared since the app was finalized, too, that is not ours.
    """
    names = set()
    for service in declared.services.values():
        for method in service.methods.values():
            registration.require_ours(app, service, method)
            names.add(method.task_name)
    return not names.isdisjoint(app.tasks)


def _pool_name(pool_cls: Any) -> str:
    """What users call the pool; it is not imported for that, gevent's would patch."""
    if isinstance(pool_cls, str):
        module = concurrency.ALIASES.get(pool_cls, pool_cls).partition(":")[0]
    else:
        module = pool_cls.__module__
    return _POOLS.get(module) or module.rpartition(".")[2]


def _require_supported(pool: str, served: Sequence[services.Service]) -> None:
    if pool not in (*_SERVING, serving.GPU_POOL):
        names = ", ".join(service.name for service in served)
        reason = _REASONS.get(pool, "asynchronous tasks need an event loop beside Celery's")
        raise errors.ConfigurationError(
            f"the pool {pool!r} cannot serve {names}: {reason}; start this worker with the GPU "
            f"pool (celery -A proj gw worker), or with -P {' or '.join(_SERVING)}"
        )
