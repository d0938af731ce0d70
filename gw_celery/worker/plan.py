"""What one worker serves, decided in its parent when it starts; and what its log says of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gw_celery import conf
from gw_celery.declare import gpu, probes, registry, services
from gw_celery.transport import find

if TYPE_CHECKING:
    from gw_celery.gpus import allocation
    from gw_celery.worker import serving

logger = logging.getLogger(__name__)

#: What the plan calls our own pool.
GPU_POOL = "gpu"
#: The name of `WorkerOptions` among the options that Celery gives to its worker.
OPTIONS = "gw_options"
#: What is declared of services and acts only on a worker that was given no size.
_BOUNDS = {"min_workers", "max_workers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The options of ``celery gw worker`` that Celery's own worker command does not have."""

    #: Kind of GPU whose families are served; ``None`` for all that the machine can serve.
    gpu: str | None = None
    #: ``None`` for as many as fit.
    replicas: int | None = None
    #: ``-Q`` names what is served.
    names_queues: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a worker serves, decided in its parent before any child exists."""

    registries: Sequence[registry.Registry]
    served: Sequence[services.Service]
    settings: conf.Settings
    #: The pool, as its users call it: prefork or solo; or ``GPU_POOL``.
    pool: str
    #: The queues that it consumes, with families expanded; without that of beat's tasks.
    queues: Sequence[str] = ()
    #: To the processes that load because Celery sends them ``worker_process_init``; ``None`` where
    #: something else has them load, or nothing is served.
    pipes: serving.Pipes | None = None
    #: The devices of each replica of our pool; ``None`` where no service needs any.
    allotment: allocation.Allotment | None = None
    #: Its size follows the load within what its services declare.
    has_declared_bounds: bool = False

    @property
    def families(self) -> dict[str, list[str]]:
        """The service queues of each family that is declared here."""
        return registry.families(self.registries)

    @property
    def strays(self) -> list[str]:
        """The queues ``cpu`` and ``gpu`` that are no family here.

        Each may be a queue of the project's own; more often a family such as ``gpu.A100`` was
        meant.
        """
        known = self.families
        return [name for name in self.queues if known and gpu.is_bare(name) and name not in known]

    @property
    def slots(self) -> dict[str, int]:
        """Inputs in flight of each service in one replica of our pool; ``""`` for other tasks."""
        return {service.key: service.max_inputs for service in self.served} | {services.PLAIN: 1}

    @property
    def queue_times(self) -> dict[str, float]:
        """Seconds that an input may wait until it begins, for each service with such a limit."""
        default = self.settings.max_queue_time
        limits = {
            service.key: service.placement.max_queue_time or default for service in self.served
        }
        return {key: limit for key, limit in limits.items() if limit is not None}

    @property
    def benchmarked(self) -> dict[str, tuple[str, ...]]:
        """The tasks of each service that have a benchmark."""
        return {
            service.key: tuple(
                method.task_name for method in service.methods.values() if method.benchmark
            )
            for service in self.served
        }

    @property
    def probes(self) -> list[tuple[str, probes.Probe]]:
        """The probes of what it serves, each with the key of its service."""
        return [(service.key, probe) for service in self.served for probe in service.probes]

    @property
    def service_queues(self) -> dict[str, str]:
        """The service of each queue; of the first one where several share a queue."""
        return {service.queue: service.key for service in reversed(self.served)}


def log_notices(app: Any, plan: Plan) -> None:
    """Log what has no effect, and what is at risk; after Celery has set up logging."""
    for name in plan.strays:
        logger.warning(
            "-Q %s: no service belongs to this family, so it is an ordinary queue of this worker; "
            "families here: %s",
            name,
            ", ".join(sorted(plan.families)),
        )
    is_ours = plan.pool == GPU_POOL
    idle = set() if plan.has_declared_bounds else _BOUNDS
    features = [
        f"{service.name}: {', '.join(names)}"
        for service in plan.served
        if (names := [name for name in service.pool_features() if not is_ours or name in idle])
    ]
    if features and is_ours:
        logger.warning(
            "these declarations have no effect on this worker, which was given its size "
            "(--replicas, --autoscale, -c, gw_replicas): %s",
            "; ".join(features),
        )
    elif features:
        logger.warning(
            "these declarations have no effect on the %s pool: %s", plan.pool, "; ".join(features)
        )
    _log_unlimited(app, plan)


def _log_unlimited(app: Any, plan: Plan) -> None:
    """Say which tasks Redis may deliver twice: the unlimited ones, which it cannot wait for."""
    methods = [method for service in plan.served for method in service.methods.values()]
    tasks = [app.tasks[method.task_name] for method in methods]
    unlimited = sorted(task.name for task in tasks if task.acks_late and not task.time_limit)
    with app.connection_for_read() as connection:
        transport = find.redis_transport(connection)
    if unlimited and transport is not None:
        options = app.conf.broker_transport_options or {}
        logger.warning(
            "tasks without a time limit: %s. Redis delivers an input a second time if it runs for "
            "over broker_transport_options['visibility_timeout']=%s s: declare timeout=, or set "
            "visibility_timeout over the longest run",
            ", ".join(unlimited),
            options.get("visibility_timeout", transport.Channel.visibility_timeout),
        )
