"""A service whose benchmark takes ``NAP`` seconds an input."""

from __future__ import annotations

import asyncio
import os

from celery import Celery

import gw_celery as gw

celery = Celery("paced", set_as_current=False)
gw.preset(celery)
celery.conf.update(worker_pool="gw_celery.pool:TaskPool", gw_replicas=1)
app = gw.App("paced", celery)


@app.remote(
    gpu=gw.Gpu("CPU"), benchmark_dataset=[{"number": 0}], benchmark_runs=1, benchmark_concurrency=1
)
async def step(number: int) -> int:
    await asyncio.sleep(float(os.environ.get("NAP", "0.1")))
    return number
