"""Decide, when a worker starts, what it serves; refuse what cannot work.

Celery logs a failed check and goes on, so that the checks here end the process themselves.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from celery import concurrency

from gw_celery import conf, errors
from gw_celery.declare import gpu, registry, services
from gw_celery.worker import bootsteps, control, preset, serving

_POOLS = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.solo": "solo",
    "celery.concurrency.thread": "threads",
}


def prepare(worker: Any, registries: Sequence[registry.Registry]) -> serving.Plan:
    """Expand families, check the configuration, and return what ``worker`` serves.

    Raises:
        ConfigurationError: for settings that contradict each other or the pool.
    """
    settings = conf.read(worker.app.conf)
    preset.configure_codec(settings)
    known = [one for one in registries if _belongs(one, worker.app)]
    preset.require_visibility(worker.app, known)
    expand_families(worker.app.amqp.queues, known)
    served = list(registry.serving(known, worker.app.amqp.queues.consume_from))
    pool = _pool_name(worker.pool_cls)
    plan = serving.Plan(registries=known, served=served, settings=settings, pool=pool)
    if served:
        plan = dataclasses.replace(plan, failures=os.pipe())
        _require_supported(pool, served)
        preset.require_content(worker.app)
        preset.tune_worker(worker, settings)
        bootsteps.install(worker, plan)
        control.guard(plan)
    return plan


def expand_families(queues: Any, registries: Sequence[registry.Registry]) -> None:
    """Replace the name of a family among the consumed queues by its service queues.

    Raises:
        ConfigurationError: for a family that no service belongs to.
    """
    families = registry.families(registries)
    served = {queue for listed in families.values() for queue in listed}
    for name in [one for one in queues.consume_from if one not in served]:
        if name in families:
            queues.deselect(name)
            for queue in families[name]:
                queues.select_add(queue)
        elif gpu.is_family(name):
            known = ", ".join(sorted(families)) or "none: is the module that declares them imported"
            raise errors.ConfigurationError(
                f"-Q {name}: no service belongs to this family or queue; families here: {known}"
            )


def _belongs(declared: registry.Registry, app: Any) -> bool:
    """By the names of its tasks: a spawned child has copies of both."""
    return any(
        method.task_name in app.tasks
        for service in declared.services.values()
        for method in service.methods.values()
    )


def _pool_name(pool_cls: Any) -> str:
    """What users call the pool; it is not imported for that, gevent's would patch."""
    if isinstance(pool_cls, str):
        module = concurrency.ALIASES.get(pool_cls, pool_cls).partition(":")[0]
    else:
        module = pool_cls.__module__
    return _POOLS.get(module) or module.rpartition(".")[2]


def _require_supported(pool: str, served: Sequence[services.Service]) -> None:
    if pool not in _POOLS.values():
        names = ", ".join(one.name for one in served)
        raise errors.ConfigurationError(
            f"the pool {pool!r} cannot serve {names}: asynchronous tasks need an event loop beside "
            f"Celery's; start this worker with -P prefork, threads or solo"
        )
