"""Steps of the worker: on stock pools for what is served and loaded, else for the autoscaler."""

from __future__ import annotations

import logging
import threading
from typing import Any, cast

from celery import bootsteps
from celery.worker import state

from gw_celery import signals
from gw_celery.runtime import lifecycle
from gw_celery.worker import serving, start_notices
from gw_celery.worker.pipes import Pipes

logger = logging.getLogger(__name__)


class ServingStep(bootsteps.StartStopStep):
    """Says what the worker serves, in its log and in ``inspect stats``."""

    requires = ("celery.worker.components:Hub", "celery.worker.components:Pool")

    def start(self, worker: Any) -> None:
        # Not earlier: Celery sets up logging after ``worker_init``.
        start_notices.log(worker.app, _plan())

    def info(self, worker: Any) -> dict[str, Any]:
        served = {service.name: service.queue for service in _plan().served}
        return {"gw_celery": {"pool": _plan().pool, "serves": served}}


class ChildrenStep(bootsteps.StartStopStep):
    """Tells children that load when their worker stops, and stops it when one cannot load."""

    requires = ServingStep.requires
    pipes: Pipes

    def include_if(self, worker: Any) -> bool:
        if (pipes := _plan().pipes) is not None:
            self.pipes = pipes
        return pipes is not None

    def start(self, worker: Any) -> None:
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
            worker.exitcode = state.should_stop = lifecycle.EX_FAILURE


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


def _plan() -> serving.Plan:
    """What this worker serves: ``worker_init`` comes before its steps are made."""
    return cast(serving.Plan, signals.plan())
