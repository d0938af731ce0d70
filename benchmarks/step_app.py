"""What ``benchmarks.step`` loads: 50 ms for an input, one at a time, after 3 s of loading."""

from __future__ import annotations

import asyncio
import os
import time

from celery import Celery

import gw_celery as gw

celery = Celery("step", set_as_current=False)
if "INACTIVITY" in os.environ:
    celery.conf.gw_inactivity_timeout = float(os.environ["INACTIVITY"])
gw.preset(celery)
app = gw.App("step", celery)


@app.cls(gpu=gw.Gpu("CPU"), min_workers=1, max_workers=4)
class Model:
    @gw.on_enter()
    async def load(self) -> None:
        _write("S", os.getpid())
        await asyncio.sleep(3.0)

    @gw.method(benchmark_dataset=[{"number": -1, "sent": 0.0}], benchmark_runs=2)
    async def infer(self, number: int, sent: float) -> None:
        await asyncio.sleep(0.05)
        if number >= 0:
            _write("E", number, f"{time.monotonic() - sent:.3f}")


def _write(*words: object) -> None:
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)
