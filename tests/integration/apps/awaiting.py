"""An app on the GPU pool, one of whose bodies waits for a task that another input runs.

A result backend that nothing notifies of answers would be asked for them only after minutes.
"""

from __future__ import annotations

import asyncio

from celery import Celery

import gw_celery as gw

celery = Celery("awaiting", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.gw_poll_interval = 600.0
app = gw.App("awaiting", celery)
CPU = gw.Gpu("CPU")


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def add(x: int, y: int) -> int:
    # A caller that asks only once, at first, finds nothing.
    await asyncio.sleep(0.3)
    return x + y


@app.remote(gpu=CPU)
async def ask(x: int) -> list[int]:
    """Get one answer after the other, each from a call of its own."""
    return [await add.aremote(x, y) for y in range(3)]
