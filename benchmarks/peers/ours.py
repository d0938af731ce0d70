"""The workload as a service of the GPU pool."""

from __future__ import annotations

from typing import Any

from celery import Celery

import gw_celery as gw
from benchmarks.peers import bodies, workloads

workload = workloads.chosen()
celery = Celery("peers", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
app = gw.App("peers", celery)


@app.cls(gpu=gw.Gpu("CPU"))
class Service:
    """A model behind a batched method."""

    @gw.on_enter()
    def load(self) -> None:
        self.model = bodies.load(workload)

    @gw.method()
    @gw.batched(max_batch_size=workload.max_batch, wait_ms=workload.wait_ms)
    def infer(self, values: list[Any]) -> list[Any]:
        return self.model(values)


@app.remote(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=64)
async def noop(value: Any) -> Any:
    return value


@app.remote(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=64)
async def io(value: Any) -> Any:
    return await bodies.io(value)


infer = Service().infer if workload.has_model else {"noop": noop, "io": io}[workload.name]
