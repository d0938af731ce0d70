"""Which queues and how many replicas a worker with the GPU pool has, and on which devices.

It is decided once, in ``worker_init``: the services are known and nothing has started.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from billiard import cpu_count

from gw_celery import conf, errors
from gw_celery.declare import gpu, registry
from gw_celery.gpus import allocation, devices, discovery
from gw_celery.transport import find
from gw_celery.worker import serving
from gw_celery.worker.options import WorkerOptions

logger = logging.getLogger(__name__)


def select_families(
    worker: Any,
    typed: WorkerOptions,
    registries: Sequence[registry.Registry],
    settings: conf.Settings,
) -> None:
    """Have ``worker`` consume the families that ``gw worker`` takes on this machine.

    Raises:
        ConfigurationError: when it can serve none of them, with what there is.
    """
    if typed.names_queues:
        return
    declared: dict[str, list[gpu.Gpu | None]] = {}
    for declarations in registries:
        for service in declarations.services.values():
            declared.setdefault(service.family, []).append(service.placement.gpu)
    # The CPU needs no look at the GPUs.
    there = devices.NONE if typed.gpu == "CPU" else discovery.find(settings.gpu_kinds)
    worker.app.amqp.queues.select(allocation.families_for(typed.gpu, declared, there))


def allot(plan: serving.Plan) -> allocation.Allotment | None:
    """Return which devices each replica of this worker gets; ``None`` where they need none.

    NVML is read only for services that need a kind of GPU.

    Raises:
        ConfigurationError: when not even one replica fits on this machine.
    """
    needs = allocation.needs_of(service.placement.gpu for service in plan.served)
    return allocation.allot(needs, discovery.find(plan.settings.gpu_kinds)) if needs else None


def fit(worker: Any, plan: serving.Plan, typed: WorkerOptions | None) -> bool:
    """Set the slots of ``worker``, which Celery calls its concurrency, or their bounds.

    Returns whether the bounds are those that its services declare.

    Raises:
        ConfigurationError: when more replicas are asked for than fit.
    """
    per_replica = sum(plan.slots.values())
    autoscale = worker.options.get("autoscale")
    scale = autoscale or _declared_bounds(plan, typed)
    if scale and not isinstance(scale, str):  # text comes from programs only
        # Celery's own options count slots, those of ``gw worker`` and of services replicas.
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


def _declared_bounds(plan: serving.Plan, typed: WorkerOptions | None) -> tuple[int, int] | None:
    """The most and the least replicas of a worker that ``gw worker`` started without a size.

    A replica holds every service: there are as many as the greediest wants, and as many stay as the
    neediest does. ``None`` where no service, and no setting, says anything about it.
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
    """Refuse to go to zero where the worker would not learn of the next message."""
    if least:
        return
    with worker.app.connection_for_read() as connection:
        if not find.tells_lengths(connection):
            raise errors.ConfigurationError(
                f"a worker that may have no replica must know what waits in its queues, and the "
                f"transport {connection.transport_cls!r} does not tell: let one stay "
                f"(min_workers=1, or --autoscale MAX,1), or use Redis or RabbitMQ"
            )


def _require_room(plan: serving.Plan, replicas: int) -> None:
    if plan.allotment and (why := plan.allotment.refusal(replicas)) is not None:
        raise errors.ConfigurationError(why)


def _slots_that_fit(slots: Any, allotment: allocation.Allotment, per_replica: int) -> int:
    """Return ``slots``; Celery's default, which no user asked for, is cut to what fits."""
    most = allotment.most * per_replica
    is_default = slots in ("auto", cpu_count())
    wanted = most if slots == "auto" else int(slots)
    why = allotment.refusal(math.ceil(wanted / per_replica))
    if why is None:
        return wanted
    if not is_default:
        raise errors.ConfigurationError(f"-c {slots}, of {per_replica} slots a replica: {why}")
    logger.warning("without -c: %d slots, all that fit here", most)
    return most
