"""What ``benchmarks.holds`` runs: bodies that write down their start and end."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from typing import Any

from celery import Celery

import gw_celery as gw

celery = Celery("holds", set_as_current=False)
gw.preset(celery)
celery.conf.update(
    worker_pool="gw_celery.pool:TaskPool",
    worker_prefetch_multiplier=2,
    gw_replicas=2,
    gw_worker_ttl=float(os.environ.get("TTL", "15")),
)
app = gw.App("holds", celery)


@app.remote(gpu=gw.Gpu("CPU"), timeout=900)
@gw.concurrent(max_inputs=32)
async def once(name: str, seconds: float) -> int:
    """Sleep in the first run only, so that a second one shows when it began."""
    is_first = name.startswith("s") or not _began(name)
    _write(f"B {name} {os.getpid()} {time.time()}\n")
    await asyncio.sleep(seconds if is_first else 0.01)
    _write(f"E {name} {os.getpid()} {time.time()}\n")
    return os.getpid()


@app.remote(gpu=gw.Gpu("CPU"), timeout=900)
@gw.concurrent(max_inputs=32)
async def pace(name: str, seconds: float) -> str:
    """Return a value that each run has of its own."""
    _write(f"B {name} {os.getpid()} {time.time()}\n")
    await asyncio.sleep(seconds)
    _write(f"E {name} {os.getpid()} {time.time()}\n")
    return uuid.uuid4().hex


@celery.task(queue="cpu")
def noted(*args: Any) -> None:
    """Stand for the errback of an input."""
    _write("X\n")


def _began(name: str) -> bool:
    with open(os.environ["LEDGER"], "ab+") as file:
        file.seek(0)
        return f"B {name} ".encode() in file.read()


def _write(line: str) -> None:
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
