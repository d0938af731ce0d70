"""A class task with parameters, whose loads a ledger counts.

Environment: ``POOL`` is the worker's pool, where it is not Celery's; ``HELD`` names a file that
loads of other models than the default wait for.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import ledger
from celery import Celery

import gw_celery as gw

celery = Celery("tuned", set_as_current=False)
gw.preset(celery)
if "POOL" in os.environ:
    celery.conf.worker_pool = os.environ["POOL"]
celery.conf.gw_cancel_timeout = 1.0
app = gw.App("tuned", celery)


@app.cls(gpu=gw.Gpu("CPU"))
@gw.concurrent(max_inputs=128)
class Classifier:
    model: str = gw.parameter(default="m0")
    threshold: float = gw.parameter(default=0.5)

    @gw.on_enter()
    async def load(self) -> None:
        ledger.write("loading", self.model)
        while self.model != "m0" and not _may_go_on():  # noqa: ASYNC110 another process says when
            await asyncio.sleep(0.02)
        self.loaded = self.model

    @gw.on_exit()
    async def unload(self) -> None:
        await asyncio.sleep(0.02)
        ledger.write("unloaded", self.loaded)

    @gw.method()
    def classify(self, score: float) -> tuple[str, bool]:
        time.sleep(0.005)
        return self.loaded, score > self.threshold

    @gw.method()
    async def classify_async(self, score: float) -> tuple[str, bool]:
        await asyncio.sleep(0.005)
        return self.loaded, score > self.threshold

    @gw.method()
    @gw.batched(max_batch_size=16, wait_ms=20)
    async def classify_batched(self, scores: list[float]) -> list[tuple[str, bool]]:
        await asyncio.sleep(0.005)
        return [(self.loaded, score > self.threshold) for score in scores]


def _may_go_on() -> bool:
    return "HELD" not in os.environ or Path(os.environ["HELD"]).exists()
