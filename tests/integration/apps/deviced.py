"""Services for GPUs, which say on which they run: tests start it with ``GW_FAKE_GPUS``.

Environment: ``SETTINGS`` is JSON of Celery's configuration.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os

from celery import Celery

import gw_celery as gw

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Before anything of this module could change it.
AT_IMPORT = os.environ.get(VISIBLE)

celery = Celery("deviced", set_as_current=False)
gw.preset(celery)
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("deviced", celery)


def seen() -> tuple[str, int, str | None]:
    """The replica, its process, and the devices that it saw from its start."""
    return multiprocessing.current_process().name, os.getpid(), AT_IMPORT


@app.remote(gpu=gw.Gpu("A100"))
async def single(seconds: float = 0.05) -> tuple[str, int, str | None]:
    await asyncio.sleep(
        seconds
    )  # its only slot is taken meanwhile: the next goes to another replica
    return seen()


@app.remote(gpu=gw.Gpu("A100", 2))
async def double() -> tuple[str, int, str | None]:
    return seen()


@app.remote(gpu=gw.Gpu("L4", memory_gb=10))
async def small() -> tuple[str, int, str | None]:
    return seen()


@app.remote
async def anywhere() -> tuple[str, int, str | None]:
    return seen()


@app.remote(gpu=gw.Gpu("CPU"))
async def on_cpu() -> tuple[str, int, str | None]:
    return seen()
