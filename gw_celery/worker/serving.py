"""What one worker serves, and entering it in each of its processes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gw_celery import conf
from gw_celery.client import execution
from gw_celery.declare import probes, registry, services
from gw_celery.runtime import in_process
from gw_celery.worker.pipes import Pipes

if TYPE_CHECKING:
    from gw_celery.gpus import allocation

logger = logging.getLogger(__name__)

#: What the plan calls our own pool.
GPU_POOL = "gpu"


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
    pipes: Pipes | None = None
    #: The devices of each replica of our pool; ``None`` where no service needs any.
    allotment: allocation.Allotment | None = None
    #: Its size follows the load within what its services declare.
    has_declared_bounds: bool = False

    @property
    def families(self) -> dict[str, list[str]]:
        """The service queues of each family that is declared here."""
        return registry.families(self.registries)

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


def start(plan: Plan, check: Callable[[], None]) -> None:
    """Enter everything that ``plan`` serves in this process, before its first task.

    ``check`` raises when the process should give up; what has entered is then left.

    Raises:
        StartupError: naming each class that failed, and why.
    """
    runtime = in_process.Process(plan.settings, enforces_limits=plan.pool != "prefork")
    runtime.start()
    execution.install(runtime)
    logger.info("pid %d loads %s", runtime.pid, ", ".join(service.name for service in plan.served))
    try:
        runtime.enter(plan.registries, plan.served, check)
        check()
    except BaseException:
        execution.stop()
        raise
    logger.info("pid %d has loaded %d services", runtime.pid, len(plan.served))
