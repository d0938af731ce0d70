"""What one worker serves, decided in its parent at start-up, and the notices in its log."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gw_celery import conf
from gw_celery.declare import gpu, probes, registry, services
from gw_celery.gpus import allocation
from gw_celery.transport import find

if TYPE_CHECKING:
    from gw_celery.worker import serving

logger = logging.getLogger(__name__)

#: The name of our own pool in a plan.
GPU_POOL = "gpu"
#: The key of `WorkerOptions` among the options of Celery's worker.
OPTIONS = "gw_options"
#: Declarations that act only on a worker whose size was not given.
_BOUNDS = {"min_workers", "max_workers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The options of ``celery gw worker`` that Celery's worker command does not have."""

    #: Kind of GPU whose families are served; ``None``: all that the machine can serve.
    gpu: str | None = None
    #: Number of replicas; ``None``: as many as fit.
    replicas: int | None = None
    #: Whether ``-Q`` names the queues.
    names_queues: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a worker serves; its parent decides this before any child exists."""

    registries: Sequence[registry.Registry]
    served: Sequence[services.Service]
    settings: conf.Settings
    #: The pool by its usual name, such as prefork or solo, or ``GPU_POOL``.
    pool: str
    #: Consumed queues, with families expanded, without the queue of beat's tasks.
    queues: Sequence[str] = ()
    #: Pipes to the processes that load at ``worker_process_init``; ``None`` on other pools, or if
    #: nothing is served.
    pipes: serving.Pipes | None = None
    #: The devices of each replica of our pool; ``None`` if no service needs a device.
    allotment: allocation.Allotment | None = None
    #: Whether the size follows the load, within the bounds that services declare.
    has_declared_bounds: bool = False

    @property
    def families(self) -> dict[str, list[str]]:
        return registry.families(self.registries)

    @property
    def strays(self) -> list[str]:
        """The consumed queues ``cpu`` and ``gpu`` that are not families here.

        Such a queue may be the project's own, but often a family such as ``gpu.A100`` was meant.
        """
        known = self.families
        return [name for name in self.queues if known and gpu.is_bare(name) and name not in known]

    @property
    def slots(self) -> dict[str, int]:
        """Maximum inputs in flight per service in one replica; key ``""`` is plain tasks."""
        return {service.key: service.max_inputs for service in self.served} | {services.PLAIN: 1}

    @property
    def most_replicas(self) -> int:
        return allocation.MOST if self.allotment is None else self.allotment.most

    def refusal(self, replicas: int) -> str | None:
        """Return why this worker cannot have that many replicas; ``None`` if it can."""
        if self.allotment is not None:
            return self.allotment.refusal(replicas)
        if replicas <= allocation.MOST:
            return None
        return f"{replicas} replicas were asked for, and a worker has {allocation.MOST} at most"

    @property
    def queue_times(self) -> dict[str, float]:
        """Seconds that an input may wait before it begins, for each service with a limit."""
        default = self.settings.max_queue_time
        limits = {
            service.key: service.placement.max_queue_time or default for service in self.served
        }
        return {key: limit for key, limit in limits.items() if limit is not None}

    @property
    def benchmarked(self) -> dict[str, tuple[str, ...]]:
        return {
            service.key: tuple(
                method.task_name for method in service.methods.values() if method.benchmark
            )
            for service in self.served
        }

    @property
    def probes(self) -> list[tuple[str, probes.Probe]]:
        """The probes of all served services, with the service key."""
        return [(service.key, probe) for service in self.served for probe in service.probes]

    @property
    def service_queues(self) -> dict[str, str]:
        """The service of each queue; the first one if several share a queue."""
        return {service.queue: service.key for service in reversed(self.served)}


def log_notices(app: Any, plan: Plan) -> None:
    """Log declarations without effect, and risks, after Celery has set up logging."""
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
    if not is_ours:
        _log_unlimited(app, plan)


def _log_unlimited(app: Any, plan: Plan) -> None:
    """Warn of tasks without a time limit, which Redis may deliver twice."""
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
