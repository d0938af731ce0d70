"""What ``benchmarks.kills`` and ``outage`` run: bodies that write down their start and end."""

from __future__ import annotations

import asyncio
import os

from celery import Celery

import gw_celery as gw

celery = Celery("kills", set_as_current=False)
gw.preset(celery)
celery.conf.update(worker_pool="gw_celery.pool:TaskPool", gw_replicas=2)
app = gw.App("kills", celery)


@app.context()
class Watch:
    """Writes down how late the replica's event loop runs, where that is over 20 ms."""

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.02
            await asyncio.sleep(0.02)
            if (lag := loop.time() - due) > 0.02:
                _write(f"L {lag:.3f}\n")


@app.remote(gpu=gw.Gpu("CPU"), timeout=10, ignore_result="KEEP_RESULTS" not in os.environ)
@gw.concurrent(max_inputs=32)
async def record(number: int) -> None:
    _write(f"B {number}\n")
    await asyncio.sleep(0.005)
    _write(f"E {number}\n")


def _write(line: str) -> None:
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
