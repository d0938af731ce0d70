"""What one worker serves, and entering it in each of its processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from gw_celery import conf
from gw_celery.declare import registry, services
from gw_celery.runtime import process

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a worker serves, decided in its parent before any child exists."""

    registries: Sequence[registry.Registry]
    served: Sequence[services.Service]
    settings: conf.Settings
    #: The pool, as its users call it: prefork, solo or threads.
    pool: str
    #: Where a child writes why it cannot start; the parent reads the other end.
    failures: tuple[int, int] = (-1, -1)

    @property
    def loads_in_children(self) -> bool:
        """Whether Celery sends ``worker_process_init`` where bodies run."""
        return bool(self.served) and self.pool != "threads"

    def report(self, reason: str) -> None:
        """Tell the parent why this process cannot serve; short, so that it is one write."""
        message = json.dumps({"pid": os.getpid(), "reason": reason[:2000]}) + "\n"
        os.write(self.failures[1], message.encode())


def start(plan: Plan) -> None:
    """Enter everything that ``plan`` serves in this process, before its first task.

    Raises:
        StartupError: naming each class that failed, and why.
    """
    runtime = process.Process(plan.settings, enforces_limits=plan.pool != "prefork")
    runtime.start()
    process.adopt(runtime)
    logger.info("pid %d loads %s", runtime.pid, ", ".join(one.name for one in plan.served))
    runtime.enter(plan.registries, plan.served)
    logger.info("pid %d has loaded %d services", runtime.pid, len(plan.served))


def stop() -> None:
    """Leave what this process entered; does nothing where nothing was."""
    runtime: Any = process.current()
    if runtime is not None:
        process.adopt(None)
        runtime.stop()
