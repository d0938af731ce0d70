"""Steps of the worker.

On stock pools one says what is served, and one ends a worker that cannot load; with the GPU pool
one starts and ends what the autoscaler looks around with.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import bootsteps
from celery.worker import state

from gw_celery.runtime import fatal_exit
from gw_celery.worker import serving, start_notices
from gw_celery.worker.pipes import Pipes

logger = logging.getLogger(__name__)


class ServingStep(bootsteps.StartStopStep):
    """Says what the worker serves, in its log and in ``inspect stats``."""

    requires = ("celery.worker.components:Hub", "celery.worker.components:Pool")

    plan: serving.Plan

    def start(self, worker: Any) -> None:
        # Not earlier: Celery sets up logging after ``worker_init``.
        start_notices.log(worker.app, self.plan)

    def info(self, worker: Any) -> dict[str, Any]:
        served = {service.name: service.queue for service in self.plan.served}
        return {"gw_celery": {"pool": self.plan.pool, "serves": served}}


class ChildrenStep(ServingStep):
    """Tells children that load when their worker stops, and stops it when one cannot load."""

    pipes: Pipes

    def start(self, worker: Any) -> None:
        super().start(worker)
        if not worker.use_eventloop:
            threading.Thread(
                target=self._read, args=(worker,), name="gw-failures", daemon=True
            ).start()

    def stop(self, worker: Any) -> None:
        self.pipes.stop()  # before the pool is stopped, which waits for its children
        self.pipes.never_wait()
        self._read(worker)

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        self.pipes.never_wait()
        hub.add_reader(self.pipes.fileno(), self._read, worker)

    def _read(self, worker: Any) -> None:
        """Stop the worker when a child wrote why it cannot start."""
        for failure in self.pipes.failures():
            logger.critical(
                "child pid %d could not load, so this worker stops and its messages stay in the "
                "broker: %s",
                *failure,
            )
            worker.exitcode = state.should_stop = fatal_exit.EX_FAILURE


class ScalingStep(bootsteps.StartStopStep):
    """Begins and ends our autoscaler, where the worker has it.

    Celery starts an autoscaler only where there is no event loop, and none is told of the end.
    """

    requires = ("celery.worker.autoscale:WorkerComponent",)

    def include_if(self, worker: Any) -> bool:
        return hasattr(worker.autoscaler, "begin")

    def start(self, worker: Any) -> None:
        worker.autoscaler.begin()

    def stop(self, worker: Any) -> None:
        worker.autoscaler.end()

    terminate = stop


def install(worker: Any, plan: serving.Plan) -> None:
    """Add the step that ``plan`` needs to ``worker``, before its blueprint is made."""
    base = ServingStep if plan.pipes is None else ChildrenStep
    step = type(base.__name__, (base,), {"plan": plan, "pipes": plan.pipes})
    worker.app.steps["worker"].add(step)
