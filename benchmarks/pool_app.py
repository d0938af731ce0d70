"""What the pool is measured with: the same bodies as plain Celery tasks and as remote functions."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from celery import Celery

import gw_celery as gw

celery = Celery("pool_bench", set_as_current=False)
gw.preset(celery)
if os.environ.get("BENCH_POOL") == "gpu":
    celery.conf.worker_pool = "gw_celery.pool:TaskPool"
app = gw.App("pool_bench", celery)

DELIVERY: dict[str, Any] = {"acks_late": True, "reject_on_worker_lost": True}


@celery.task(queue="plain", **DELIVERY)
def noop(x: int) -> int:
    return x


@celery.task(queue="plain", **DELIVERY)
def nap(x: int) -> int:
    time.sleep(0.05)
    return x


@app.remote(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=64)
async def remote_noop(x: int) -> int:
    return x


@app.remote(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=64)
async def remote_nap(x: int) -> int:
    await asyncio.sleep(0.05)
    return x
