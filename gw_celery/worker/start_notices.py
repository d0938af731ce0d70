"""What a worker says once in its log when it starts: what has no effect, and what is at risk."""

from __future__ import annotations

import logging
from typing import Any

from gw_celery.declare import gpu
from gw_celery.transport import find
from gw_celery.worker import serving

logger = logging.getLogger(__name__)

#: What is declared of services and acts only on a worker that was given no size.
_BOUNDS = {"min_workers", "max_workers"}


def log(app: Any, plan: serving.Plan) -> None:
    """Log what applies; after Celery has set up logging."""
    _log_strays(plan)
    _log_what_waits(plan)
    _log_unlimited(app, plan)


def strays(plan: serving.Plan) -> list[str]:
    """Return the queues ``cpu`` and ``gpu`` that are no family here.

    Each may be a queue of the project's own; more often a family such as ``gpu.A100`` was meant.
    """
    families = plan.families
    return [name for name in plan.queues if families and gpu.is_bare(name) and name not in families]


def _log_strays(plan: serving.Plan) -> None:
    for name in strays(plan):
        logger.warning(
            "-Q %s: no service belongs to this family, so it is an ordinary queue of this worker; "
            "families here: %s",
            name,
            ", ".join(sorted(plan.families)),
        )


def _log_what_waits(plan: serving.Plan) -> None:
    """Say once what is declared but does not act on the pool in use."""
    is_ours = plan.pool == serving.GPU_POOL
    idle = set() if plan.has_declared_bounds else _BOUNDS
    features = [
        f"{service.name}: {', '.join(names)}"
        for service in plan.served
        if (names := [name for name in service.pool_features() if not is_ours or name in idle])
    ]
    if features and is_ours:
        logger.warning(
            "declared, but without effect on this worker, which was given its size "
            "(--replicas, --autoscale, -c, gw_replicas): %s",
            "; ".join(features),
        )
    elif features:
        logger.warning(
            "declared, but without effect on the %s pool: %s", plan.pool, "; ".join(features)
        )


def _log_unlimited(app: Any, plan: serving.Plan) -> None:
    """Say which tasks Redis may deliver twice: the unlimited ones, which it cannot wait for."""
    methods = [method for service in plan.served for method in service.methods.values()]
    tasks = [app.tasks[method.task_name] for method in methods]
    unlimited = sorted(task.name for task in tasks if task.acks_late and not task.time_limit)
    with app.connection_for_read() as connection:
        transport = find.redis_transport(connection)
    if unlimited and transport is not None:
        options = app.conf.broker_transport_options or {}
        logger.warning(
            "no time limit: %s. Redis delivers a task again, to run twice, that runs for longer "
            "than broker_transport_options['visibility_timeout']=%s s: declare a timeout=, or set "
            "visibility_timeout over the longest run",
            ", ".join(unlimited),
            options.get("visibility_timeout", transport.Channel.visibility_timeout),
        )
