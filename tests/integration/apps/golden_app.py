"""Tasks of every kind, whose messages, keys and results the golden files hold.

``declare`` gives them to any Celery app; ``celery`` is that of a worker on the GPU pool.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

from celery import Celery

import gw_celery as gw

CPU = gw.Gpu("CPU")


async def released(path: str) -> None:
    """Wait until a file is there; not at all without a path."""
    await asyncio.to_thread(_wait_for, path)


def _wait_for(path: str) -> None:
    while path and not os.path.exists(path):
        time.sleep(0.05)


def declare(celery: Celery) -> SimpleNamespace:
    """Declare the services and a plain task on ``celery``; returns them by name."""
    app = gw.App("golden_app", celery)

    @app.remote(gpu=CPU, name="golden.single", max_queue_time=60.0)
    @gw.concurrent(max_inputs=4)
    async def single(x: int, *, until: str = "") -> int:
        await released(until)
        return x

    @app.remote(gpu=CPU, name="golden.weighed", workload_calculator=lambda text: float(len(text)))
    async def weighed(text: str) -> int:
        return len(text)

    @app.remote(gpu=CPU, name="golden.scored", benchmark_dataset=[{"x": 1}], benchmark_runs=2)
    async def scored(x: int) -> int:
        return x

    @app.remote(gpu=CPU, name="golden.batch")
    @gw.batched(max_batch_size=2, wait_ms=10_000)
    async def batch(x: list[int]) -> list[int]:
        return [one + 1 for one in x]

    @app.remote(gpu=CPU, name="golden.early", acks_late=False)
    @gw.concurrent(max_inputs=4)
    async def early(until: str) -> None:
        await released(until)

    @app.remote(gpu=CPU, name="golden.fails")
    async def fails(text: str) -> None:
        raise ValueError(text)

    @app.remote(gpu=CPU, name="golden.kills")
    async def kills() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @app.cls(gpu=CPU, probes=[gw.Probe.on("is_well", period_s=1)])
    class Classifier:
        threshold: float = gw.parameter(default=0.5)
        labels: list[str] = gw.parameter(default=["a", "b"])

        @gw.method()
        def classify(self, text: str) -> list[Any]:
            return [self.threshold, *self.labels, text]

        @gw.method()
        def is_well(self) -> bool:
            return True

    # Not shared: it is declared for several apps of one process.
    @celery.task(name="golden.plain", shared=False)
    def plain(x: int) -> int:
        return x

    return SimpleNamespace(**{key: value for key, value in locals().items() if key != "celery"})


celery = Celery("golden_app", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
tasks = declare(celery)
