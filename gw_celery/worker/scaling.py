"""The worker step that starts and ends what the autoscaler of the GPU pool looks around with.

Celery starts an autoscaler only where there is no event loop, and none is told of the end.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

#: For workers with the GPU pool: Celery's own starts a replica for every few messages that wait.
AUTOSCALER = "gw_celery.autoscale:Autoscaler"


class ScalingStep(bootsteps.StartStopStep):
    """Begins and ends our autoscaler, where the worker has it."""

    requires = ("celery.worker.autoscale:WorkerComponent",)

    def include_if(self, worker: Any) -> bool:
        return hasattr(worker.autoscaler, "begin")

    def start(self, worker: Any) -> None:
        worker.autoscaler.begin()

    def stop(self, worker: Any) -> None:
        worker.autoscaler.end()

    terminate = stop
