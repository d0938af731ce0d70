"""``/metrics`` beside the worker's health: a picture that the loop takes, rendered when asked for.

The endpoint's thread must not wait for the pool: while the worker hangs, it is what says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from celery import bootsteps

from gw_celery import conf, errors
from gw_celery.protocol import snapshot
from gw_celery.worker import commands, http

PATH = "/metrics"
#: Named, as Celery names a worker's parts: nobody but the first scrape loads it.
_RENDERER = "gw_celery.contrib.prometheus"


class Metrics:
    """The route.

    Args:
        take: takes a picture of the worker; called in the thread of its loop.
        queues: the queue of each service.
    """

    def __init__(self, take: Callable[[], snapshot.Worker], queues: Mapping[str, str]) -> None:
        self._take = take
        self._queues = queues
        self._seen = snapshot.Worker(hostname="")
        self._page: Any = None

    def look(self) -> None:
        """Take a picture: once a second, in the thread of the loop."""
        self._seen = self._take()

    def __call__(self) -> http.Reply:
        """Answer a scrape, in the endpoint's thread."""
        try:
            page = self._rendering()
        except errors.ConfigurationError as exc:
            body = f"{exc}\n".encode()
            return http.Reply(status=501, body=body, content_type="text/plain; charset=utf-8")
        return http.Reply(body=page(), content_type=page.content_type)

    def _rendering(self) -> Any:
        if self._page is None:
            renderer = importlib.import_module(_RENDERER)
            self._page = renderer.Page(lambda: self._seen, self._queues)
        return self._page


class MetricsStep(bootsteps.StartStopStep):
    """Adds the route to the health endpoint, where there is one."""

    requires = ("celery.worker.components:Pool", "celery.worker.autoscale:WorkerComponent")

    #: The queue of each service.
    queues: Mapping[str, str]

    def include_if(self, worker: Any) -> bool:
        return conf.read(worker.app.conf).health_port is not None

    def start(self, worker: Any) -> None:
        pool = worker.pool
        metrics = Metrics(lambda: commands.status(pool, worker.autoscaler), self.queues)
        metrics.look()
        pool.health.watchers.append(metrics.look)
        pool.health.routes[PATH] = metrics


def install(worker: Any, service_queues: Mapping[str, str]) -> None:
    """Add the step to ``worker``; ``service_queues`` has the service of each queue."""
    queues = {service: queue for queue, service in service_queues.items()}
    worker.app.steps["worker"].add(type("MetricsStep", (MetricsStep,), {"queues": queues}))
