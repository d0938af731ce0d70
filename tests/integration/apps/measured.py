"""Services with benchmarks, on the GPU pool; each has a queue of its own, ``cpu.<name>``."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from typing import Any

import ledger
from celery import Celery, current_task

import gw_celery as gw

celery = Celery("measured")
celery.conf.update(
    task_default_queue="celery",
    worker_pool="gw_celery.pool:TaskPool",
    worker_hijack_root_logger=True,
    task_track_started=True,
    **json.loads(os.environ.get("SETTINGS", "{}")),
)
app = gw.App("measured", celery)
gw.preset(celery)

CPU = gw.Gpu("CPU")


@app.remote(
    gpu=CPU,
    benchmark_dataset=[{"seconds": 0.02}],
    workload_calculator=lambda seconds: 2.0,
)
@gw.concurrent(max_inputs=10)
async def rest(seconds: float) -> float:
    """As long as it is told, and say so where that is longer than in a benchmark."""
    if seconds > 1:
        ledger.write("busy")
    await asyncio.sleep(seconds)
    if seconds > 1:
        ledger.write("idle")
    return seconds


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def unmeasured(seconds: float) -> None:
    """Without a benchmark."""
    await asyncio.sleep(seconds)


@app.remote(gpu=CPU, benchmark_dataset=[{"x": 1}], benchmark_runs=3)
@gw.concurrent(max_inputs=4)
async def broken(x: int) -> int:
    """Always raise, at once: many calls a second."""
    ledger.write("broken", x)
    raise ValueError("no weights")


@app.remote(gpu=CPU, benchmark_dataset=[{"x": 1}])
async def hanging(x: int) -> int:
    """Never end."""
    ledger.write("hangs", x)
    await asyncio.Event().wait()
    return x


@app.remote(gpu=CPU, benchmark_dataset=[{"x": 1}, {"x": 2}], benchmark_runs=3)
@gw.batched(max_batch_size=8, wait_ms=5000)
async def shared(x: list[int]) -> list[int]:
    """Write the size of each call."""
    batch = gw.current_batch()
    ledger.write("batch", len(x), batch.flush if batch else "alone")
    await asyncio.sleep(0.01)
    return x


def _random() -> dict[str, Any]:
    return {"seconds": random.uniform(0.01, 0.02)}


@app.cls(gpu=CPU)
@gw.concurrent(max_inputs=4)
class Desk:
    """Two methods with benchmarks, one of them synchronous, and one without."""

    label: str = gw.parameter(default="plain")

    @gw.on_exit()
    def close(self) -> None:
        ledger.write("closed")

    @gw.method(benchmark_generator=_random, benchmark_runs=2)
    def sit(self, seconds: float) -> str:
        ledger.write("sat", self.label, threading.current_thread() is threading.main_thread())
        time.sleep(seconds)
        return self.label

    @gw.method(benchmark_dataset=[{"seconds": 0.02}], benchmark_runs=2)
    async def stand(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return self.label

    @gw.method()
    async def leave(self) -> None:
        ledger.write("left")


@app.remote(gpu=CPU, bind=True, autoretry_for=(KeyError,), benchmark_dataset=[{"x": 1}])
@gw.concurrent(max_inputs=4)
async def curious(self: Any, x: int) -> int:
    """Do what a body may do to be seen, and be told what it is."""
    self.update_state(state="CURIOUS", meta={"x": x})
    ledger.write("curious", current_task.name, self.request.id == current_task.request.id)
    await asyncio.sleep(0.001)
    return x
