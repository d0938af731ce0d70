"""What the workers of ``benchmarks.cluster`` serve: one service that is never called."""

from __future__ import annotations

from celery import Celery

import gw_celery as gw

celery = Celery("cluster_bench", set_as_current=False)
gw.preset(celery)
app = gw.App("cluster_bench", celery)


@app.remote(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=4)
async def served(x: int) -> int:
    return x
