"""The app of ``benchmarks.lone``: one body, three ways to be called."""

from __future__ import annotations

from celery import Celery

import gw_celery as gw

celery = Celery("benchmarks.lone_app", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
app = gw.App("lone", celery)


@app.cls(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=64)
class Model:
    """Answers at once."""

    @gw.method()
    async def single(self, number: int) -> int:
        return number

    @gw.method()
    @gw.batched(max_batch_size=32)
    async def batched(self, numbers: list[int]) -> list[int]:
        return numbers

    @gw.method()
    @gw.batched(max_batch_size=32, wait_ms=10)
    async def waiting(self, numbers: list[int]) -> list[int]:
        return numbers
