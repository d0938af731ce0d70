"""A service whose speed the environment says: ``NAP`` seconds an input on average, by ``WHO``."""

from __future__ import annotations

import asyncio
import os
import random
import time

from celery import Celery

import gw_celery as gw

#: Inputs in flight in one replica.
SLOTS = 32
QUEUE = "cpu.step"
TASK = "benchmarks.shares_app.step"
NAP = float(os.environ.get("NAP", "0.5"))

celery = Celery("shares", set_as_current=False)
gw.preset(celery)
# Both workers are on one machine and have the same code: they must not share a score.
celery.conf.update(worker_pool="gw_celery.pool:TaskPool", gw_replicas=1)
if os.environ.get("QUORUM"):
    celery.conf.update(
        task_default_queue_type="quorum",
        task_create_missing_queue_type="quorum",
        worker_detect_quorum_queues=True,
    )
app = gw.App("shares", celery)


@app.remote(
    gpu=gw.Gpu("CPU"),
    benchmark_dataset=[{"number": 0}],
    benchmark_runs=1,
    benchmark_concurrency=SLOTS,
)
@gw.concurrent(max_inputs=SLOTS)
async def step(number: int) -> tuple[str, float]:
    """Tell who did it, and when."""
    await asyncio.sleep(NAP * random.uniform(0.5, 1.5))
    return os.environ.get("WHO", ""), time.time()
