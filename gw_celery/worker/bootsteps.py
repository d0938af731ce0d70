"""The worker step that loads for the threads pool, and ends a worker that cannot load."""

from __future__ import annotations

import json
import logging
import os
import threading
from typing import Any

from celery import bootsteps
from celery.worker import state

from gw_celery.worker import fatal, serving

logger = logging.getLogger(__name__)


class ServingStep(bootsteps.StartStopStep):
    """Loads before the consumer starts, where the pool does not; watches for failed children."""

    requires = ("celery.worker.components:Hub", "celery.worker.components:Pool")

    plan: serving.Plan

    def start(self, worker: Any) -> None:
        # Not earlier: Celery sets up logging after ``worker_init``.
        _log_what_waits(self.plan)
        if self.plan.pool == "threads":
            with fatal.fatal_errors():
                serving.start(self.plan)
        if not worker.use_eventloop:
            threading.Thread(
                target=self._read, args=(worker,), name="gw-failures", daemon=True
            ).start()

    def stop(self, worker: Any) -> None:
        os.set_blocking(self.plan.failures[0], False)
        self._read(worker)

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        os.set_blocking(self.plan.failures[0], False)
        hub.add_reader(self.plan.failures[0], self._read, worker)

    def info(self, worker: Any) -> dict[str, Any]:
        return {"gw_celery": {"pool": self.plan.pool, "serves": _served(self.plan)}}

    def _read(self, worker: Any) -> None:
        """Stop the worker when a child wrote why it cannot start."""
        try:
            written = os.read(self.plan.failures[0], 65536)
        except BlockingIOError:
            return
        for line in written.splitlines():
            failure = json.loads(line)
            logger.critical(
                "child pid %d could not load, so this worker stops and its messages stay in the "
                "broker: %s",
                failure["pid"],
                failure["reason"],
            )
        worker.exitcode = fatal.EX_FAILURE
        state.should_stop = fatal.EX_FAILURE


def install(worker: Any, plan: serving.Plan) -> None:
    """Add the step to ``worker``, before its blueprint is made."""
    step = type("ServingStep", (ServingStep,), {"plan": plan})
    worker.app.steps["worker"].add(step)


def _log_what_waits(plan: serving.Plan) -> None:
    """Say once what is declared but does not act on the pool in use."""
    waiting = [
        f"{service.name}: {', '.join(named)}"
        for service in plan.served
        if (named := service.pool_features())
    ]
    if waiting:
        logger.warning(
            "declared, but without effect on the %s pool: %s", plan.pool, "; ".join(waiting)
        )


def _served(plan: serving.Plan) -> dict[str, str]:
    return {service.name: service.queue for service in plan.served}
