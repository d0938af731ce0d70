"""An app on the GPU pool whose inputs have a workload, and wait for so long only.

Environment: ``SETTINGS`` is JSON of Celery's configuration.
"""

from __future__ import annotations

import json
import os
from typing import Any

import ledger
import resting
from celery import Celery

import gw_celery as gw

celery = Celery("weighed", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.task_queue_max_priority = 10
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("weighed", celery)
CPU = gw.Gpu("CPU")
#: Seconds that inputs of ``patient`` and its likes wait at most.
LIMIT = 1.5


def by_size(name: str, seconds: float = 0.0, size: float = 1.0) -> float:
    return size


@app.remote(gpu=CPU, workload_calculator=by_size)
@gw.concurrent(max_inputs=2)
async def weigh(name: str, seconds: float = 0.0, size: float = 1.0) -> str:
    return await resting.rest(name, seconds)


@app.cls(gpu=CPU)
class Scale:
    @gw.method(workload_calculator=lambda name, size: size)
    async def weigh(self, name: str, size: float) -> str:
        return await resting.rest(name, 0.0)


@app.remote(gpu=CPU, bind=True, max_retries=3, workload_calculator=lambda name, size: size)
async def tried(self: Any, name: str, size: float) -> list[float]:
    """Retried with the same size, then a larger one; returns the workload of each message."""
    seen = json.loads(name) if name.startswith("[") else []
    seen.append(self.request.headers["gw-workload"])
    if self.request.retries < 2:
        size += self.request.retries
        raise self.retry(args=(json.dumps(seen), size), countdown=0.05)
    return seen


@app.remote(gpu=CPU, bind=True)
async def headers_of(self: Any, *before: Any) -> dict[str, Any]:
    """The headers of ours that its message carried; it has no calculator."""
    found = self.request.headers or {}
    return {key: found[key] for key in found if key.startswith("gw-")}


@app.remote(gpu=CPU, max_queue_time=LIMIT)
async def patient(name: str, seconds: float = 0.0) -> str:
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU, max_queue_time=LIMIT, acks_late=False)
async def hasty(name: str, seconds: float = 0.0) -> str:
    """Acknowledged when it begins."""
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU, max_queue_time=LIMIT, bind=True, max_retries=3)
async def patiently_tried(self: Any) -> int:
    """Retried after more than it may wait."""
    if self.request.retries < 1:
        raise self.retry(countdown=LIMIT + 1)
    return int(self.request.retries)


@app.remote(gpu=CPU, max_queue_time=LIMIT)
@gw.batched(max_batch_size=1, wait_ms=0)
async def one_by_one(name: list[str], seconds: list[float]) -> list[str]:
    """Inputs gather in the replica, and run one at a time."""
    return [await resting.rest(one, rest) for one, rest in zip(name, seconds, strict=True)]


@app.remote(gpu=CPU)
async def single(name: str, seconds: float = 0.0) -> str:
    return await resting.rest(name, seconds)


@celery.task
def note(request: Any, exc: Any = None, traceback: Any = None, name: str = "") -> None:
    """An errback."""
    ledger.write("errback", name)
