"""The workload as a task of celery-batches, which runs in a virtual environment of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from celery import Celery, signals
from celery_batches import Batches

from benchmarks.peers import bodies, workloads

workload = workloads.chosen()
celery = Celery("peers", set_as_current=False)
celery.conf.task_default_queue = "peers"
# As its documentation asks: more than a batch, or none ever fills.
celery.conf.worker_prefetch_multiplier = workload.in_flight
_loaded: dict[str, Any] = {}


@signals.worker_process_init.connect
def _load(**_: Any) -> None:
    _loaded["model"] = bodies.load(workload)


# Where the others do not batch, it may take as many as they have in flight: it can do no less.
@celery.task(
    name="peers.infer",
    base=Batches,
    flush_every=workload.max_batch if workload.has_model else workload.in_flight,
    flush_interval=workload.wait_ms / 1000,
    acks_late=True,
)
def infer(requests: list[Any]) -> None:
    values = [request.args[0] for request in requests]
    if workload.name == "io":
        answers = asyncio.run(_together(values))
    else:
        answers = _loaded["model"](values)
    for request, answer in zip(requests, answers, strict=True):
        celery.backend.mark_as_done(request.id, answer, request=request)


async def _together(values: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*map(bodies.io, values)))
