"""Decides at start-up, in the worker's parent, what it serves, with which replicas and devices.

It refuses what cannot work. Celery logs an exception of a signal receiver and continues, so that
the checks end the process themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from billiard import cpu_count
from celery import concurrency

from gw_celery import conf, errors
from gw_celery.client import beat_tasks, preset, task
from gw_celery.cluster import fence
from gw_celery.declare import gpu, registry
from gw_celery.gpus import allocation, devices
from gw_celery.runtime import django_connections, lifecycle, log_records
from gw_celery.transport import find
from gw_celery.worker import commands, consumer, gate, serving
from gw_celery.worker.plan import GPU_POOL, OPTIONS, Plan, WorkerOptions

logger = logging.getLogger(__name__)

_POOLS = {
    "celery.concurrency.thread": "threads",
    "gw_celery.pool": GPU_POOL,
    "gw_celery.pool.taskpool": GPU_POOL,
}
#: Celery's pools that can serve: it sends ``worker_process_init`` in their processes.
_SERVING = ("prefork", "solo")


def prepare_or_exit(worker: Any, registries: Sequence[registry.Registry]) -> Plan:
    """Run ``prepare``, and end the process if it raises, which Celery would only log.

    Raises:
        SystemExit: after logging the reason.
    """

    def note(reason: str) -> None:
        # Logging is not set up yet, and a detached worker writes to this file only.
        if isinstance(path := getattr(worker, "logfile", None), str) and "%" not in path:
            with contextlib.suppress(OSError), open(path, "a") as log:
                log.write(f"gw_celery: {reason}\n")

    with lifecycle.fatal_errors(note):
        return prepare(worker, registries)


def prepare(worker: Any, registries: Sequence[registry.Registry]) -> Plan:
    """Expand families, check the configuration, and return what ``worker`` serves.

    Raises:
        ConfigurationError: for settings that contradict each other or the pool, TLS that does not
            verify its server, a missing GPU, or CUDA initialized in a process that the pool would
            fork.
        DeclarationError: for a service and a plain task of the same name.
    """
    app, queues = worker.app, worker.app.amqp.queues
    settings = conf.read(app.conf)
    preset.configure_codec(settings)
    registries = [declared for declared in registries if _belongs(declared, app)]
    preset.require_verified_tls(app)
    typed: WorkerOptions | None = worker.options.pop(OPTIONS, None)
    if typed is not None and not typed.names_queues:
        queues.select(_families_for(typed.gpu, registries, settings))
    _expand_families(queues, registries)
    if beat_tasks.QUEUE in queues.consume_from:
        _consume_ticks(app)
    commands.install_ticks()
    served = list(registry.serving(registries, queues.consume_from))
    pool = _pool_name(worker.pool_cls)
    plan = Plan(
        registries=registries,
        served=served,
        settings=settings,
        pool=pool,
        queues=tuple(name for name in queues.consume_from if name != beat_tasks.QUEUE),
        pipes=serving.Pipes() if served and pool in _SERVING else None,
    )
    if served:
        _prepare_to_serve(worker, plan)
    if served or pool == GPU_POOL:
        log_records.install()
        consumer.bound_compression(settings.max_payload_bytes)
    if pool == GPU_POOL:
        return _prepare_gpu_pool(worker, plan, typed)
    if served or plan.strays:
        app.steps["worker"].add(serving.ServingStep)
    return plan


def _belongs(declared: registry.Registry, app: Any) -> bool:
    """Return whether an App belongs to ``app``, by its task names; a spawned child has copies.

    Raises:
        DeclarationError: if a plain task has the name of one of ours.
    """
    names = set()
    for service in declared.services.values():
        for method in service.methods.values():
            task.require_ours(app, service, method)
            names.add(method.task_name)
    return not names.isdisjoint(app.tasks)


def _families_for(
    kind: str | None, registries: Sequence[registry.Registry], settings: conf.Settings
) -> list[str]:
    """Return the families that ``gw worker`` consumes on this machine.

    Raises:
        ConfigurationError: if the machine can serve none of them; the message says what it has.
    """
    declared: dict[str, list[gpu.Gpu | None]] = {}
    for declarations in registries:
        for service in declarations.services.values():
            declared.setdefault(service.family, []).append(service.placement.gpu)
    # The CPU family does not depend on the GPUs.
    there = devices.NONE if kind == "CPU" else devices.find(settings.gpu_kinds)
    return allocation.families_for(kind, declared, there)


def _expand_families(queues: Any, registries: Sequence[registry.Registry]) -> None:
    """Replace each family among the consumed queues with its service queues.

    Raises:
        ConfigurationError: for a dotted family or service queue without a service. A plain ``cpu``
            or ``gpu`` may be the project's own queue.
    """
    families = registry.families(registries)
    served = {queue for listed in families.values() for queue in listed}
    for name in [queue for queue in queues.consume_from if queue not in served]:
        if name in families:
            queues.deselect(name)
            for queue in families[name]:
                # The queue as clients declare it, with its type and priorities.
                queues.select_add(queues[queue])
        elif "." in name and gpu.is_family(name):  # a project may have its own queue "cpu"
            here = ", ".join(sorted(families)) or "none: is the module that declares them imported"
            raise errors.ConfigurationError(
                f"-Q {name}: no service belongs to this family or queue; families here: {here}"
            )


def _consume_ticks(app: Any) -> None:
    """Consume the queue of beat's tasks, regardless of ``-Q``."""
    beat_tasks.add_queue(app)
    queues = app.amqp.queues
    try:
        queues.consume_from[beat_tasks.QUEUE] = queues[beat_tasks.QUEUE]
    except KeyError:
        logger.warning(
            "task_queues lacks %s and task_create_missing_queues is off: this worker runs none of "
            "beat's tasks. Add the queue to task_queues",
            beat_tasks.QUEUE,
        )


def _pool_name(pool_cls: Any) -> str:
    """Return the pool's usual name without importing it; gevent would monkey-patch."""
    if isinstance(pool_cls, str):
        module = concurrency.ALIASES.get(pool_cls, pool_cls).partition(":")[0]
    else:
        module = pool_cls.__module__
    return _POOLS.get(module) or module.rpartition(".")[2]


def _prepare_to_serve(worker: Any, plan: Plan) -> None:
    """Refuse a pool that cannot serve; set the options that a loading worker needs."""
    app, pool = worker.app, plan.pool
    if pool not in (*_SERVING, GPU_POOL):
        names = ", ".join(service.name for service in plan.served)
        reason = "asynchronous tasks need an event loop beside Celery's"
        if pool == "threads":
            reason = "a limit or a revocation cannot stop the body of a thread"
        raise errors.ConfigurationError(
            f"the pool {pool!r} cannot serve {names}: {reason}; start this worker with the GPU "
            f"pool (celery -A proj gw worker), or with -P {' or '.join(_SERVING)}"
        )
    # A spawned process inherits no CUDA state.
    if pool == "prefork" and getattr(worker, "pool_start_method", "fork") == "fork":
        serving.refuse_cuda()
    preset.require_content(app)
    if pool != GPU_POOL:
        preset.require_visibility(app, plan.registries)
    # Prefork kills a replacement child that is not up within this time (default 4 s).
    app.conf.worker_proc_alive_timeout = max(
        app.conf.worker_proc_alive_timeout, plan.settings.start_timeout + 30
    )
    app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
    # ``--prefetch-multiplier`` with the default value looks like a missing option.
    is_default = worker.prefetch_multiplier == app.conf.worker_prefetch_multiplier
    if is_default and not conf.is_set(app.conf, "worker_prefetch_multiplier"):
        worker.prefetch_multiplier = 1
    commands.guard_queues(plan)


# -- the GPU pool: devices, size, and what only its worker has --


def _prepare_gpu_pool(worker: Any, plan: Plan, typed: WorkerOptions | None) -> Plan:
    # Read NVML only if services need a kind of GPU.
    if needs := allocation.needs_of(service.placement.gpu for service in plan.served):
        there = devices.find(plan.settings.gpu_kinds)
        plan = dataclasses.replace(plan, allotment=allocation.allot(needs, there))
    plan = dataclasses.replace(plan, has_declared_bounds=_fit(worker, plan, typed))
    fence.install_in_parent(worker.app, django_connections.around(worker.app))
    commands.guard_size()
    commands.install()
    commands.check_arguments()
    # The gate owns the prefetch count, and sets it at every connection.
    worker.app.conf.worker_enable_prefetch_count_reduction = False
    if not conf.is_set(worker.app.conf, "worker_autoscaler"):
        # Celery's own autoscaler starts a replica for every few waiting messages.
        worker.autoscaler_cls = "gw_celery.autoscale:Autoscaler"
    worker.consumer_cls = consumer.Consumer
    with worker.app.connection_for_read() as connection:
        if find.redis_transport(connection) is not None:
            # An error that Redis answers, such as BUSY, must not end the worker.
            worker.app.conf.broker_channel_error_retry = True
    worker.app.steps["consumer"].add(gate.GateStep)
    if plan.probes or any(plan.benchmarked.values()):
        _consume_ticks(worker.app)
    return plan


def _fit(worker: Any, plan: Plan, typed: WorkerOptions | None) -> bool:
    """Set the slots of ``worker`` (Celery's concurrency), or their bounds.

    Returns:
        Whether the bounds are those that the services declare.

    Raises:
        ConfigurationError: if more replicas are requested than fit.
    """
    per_replica = sum(plan.slots.values())
    autoscale = worker.options.get("autoscale")
    scale = autoscale or _declared_bounds(plan, typed)
    if scale and not isinstance(scale, str):  # only programs pass text
        # Celery's own options count slots; those of ``gw worker`` and of services count replicas.
        unit = 1 if typed is None else per_replica
        _require_room(plan, math.ceil(max(scale) * unit / per_replica))
        _require_lengths(worker, min(scale))
        worker.options["autoscale"] = tuple(bound * unit for bound in scale)
        return not autoscale
    replicas = (typed and typed.replicas) or plan.settings.replicas
    if replicas is None and typed is not None:
        replicas = plan.allotment.most if plan.allotment else 1
    if replicas is not None:
        _require_room(plan, replicas)
        worker.concurrency = replicas * per_replica
    elif plan.allotment is not None:
        worker.concurrency = _slots_that_fit(worker.concurrency, plan.allotment, per_replica)
    return False


def _declared_bounds(plan: Plan, typed: WorkerOptions | None) -> tuple[int, int] | None:
    """Return the maximum and minimum of replicas for a ``gw worker`` that was given no size.

    A replica holds every service, so that the largest declared values apply. ``None`` if no service
    and no setting declares anything.
    """
    settings, placements = plan.settings, [service.placement for service in plan.served]
    if typed is None or typed.replicas or settings.replicas or not placements:
        return None
    least = max(placement.min_workers for placement in placements)
    limits = (placement.max_workers for placement in placements)
    declared = [limit for limit in limits if limit is not None]
    if not (least or declared or settings.inactivity_timeout):
        return None
    most = max([1, least, *declared])
    if plan.allotment is not None:
        fitting = plan.allotment.most
        most = min(most, fitting) if len(declared) == len(placements) else fitting
    return most, min(least, most)


def _require_lengths(worker: Any, least: int) -> None:
    """Refuse zero replicas if the worker could not learn of the next message."""
    if least:
        return
    with worker.app.connection_for_read() as connection:
        if not find.tells_lengths(connection):
            raise errors.ConfigurationError(
                f"a worker that may have no replica must know what waits in its queues, which the "
                f"transport {connection.transport_cls!r} does not tell: keep one replica "
                f"(min_workers=1, or --autoscale MAX,1), or use Redis or RabbitMQ"
            )


def _require_room(plan: Plan, replicas: int) -> None:
    if (why := plan.refusal(replicas)) is not None:
        raise errors.ConfigurationError(why)


def _slots_that_fit(slots: Any, allotment: allocation.Allotment, per_replica: int) -> int:
    """Return ``slots``; reduce Celery's default, which no user requested, to what fits."""
    most = allotment.most * per_replica
    is_default = slots in ("auto", cpu_count())
    wanted = most if slots == "auto" else int(slots)
    why = allotment.refusal(math.ceil(wanted / per_replica))
    if why is None:
        return wanted
    if not is_default:
        raise errors.ConfigurationError(f"-c {slots}, of {per_replica} slots a replica: {why}")
    logger.warning("this worker has %d slots, as many as fit here: -c was not given", most)
    return most
