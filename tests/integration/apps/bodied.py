"""An app on the GPU pool whose messages hold objects that tell a ledger where they are decoded.

Environment: ``SETTINGS`` is JSON of Celery's configuration; ``LEDGER`` the file that is told.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from typing import Any

import ledger
import misdeeds
from celery import Celery

import gw_celery as gw

celery = Celery("bodied", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("bodied", celery)
CPU = gw.Gpu("CPU")


class Told:
    """Tells the ledger when it is decoded: by gw-json, or by pickle."""

    def __init__(self, name: str, how: str = "") -> None:
        self.name, self.how = name, how

    def __reduce__(self) -> tuple[Any, ...]:
        return decode, ([self.name, self.how],)


def decode(payload: list[str]) -> Told:
    """Note where, then do what breaks a process, if the message says so."""
    told = Told(*payload)
    ledger.write("decoded", told.name)
    if told.how:
        misdeeds.DEEDS[told.how](60.0)
    return told


gw.register_type(Told, name="told", encode=lambda told: [told.name, told.how], decode=decode)


@dataclasses.dataclass
class Tmp:
    """Deletes a file when it is dropped, as a class of a user may."""

    path: str

    def __del__(self) -> None:
        ledger.write("deleted", self.path)


def name_of(told: Any) -> str:
    return told.name if isinstance(told, Told) else str(told)


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=8)
async def echo(told: Any, tmp: Tmp | None = None) -> str:
    return name_of(told)


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=8)
async def rest(told: Any, seconds: float) -> str:
    await asyncio.sleep(seconds)
    return name_of(told)


@app.remote(gpu=CPU)
@gw.batched(max_batch_size=8, wait_ms=50)
async def batched(told: list[Any]) -> list[str]:
    return [name_of(one) for one in told]


@celery.task
def plain(told: Any) -> str:
    return name_of(told)


@celery.task
def plain_rest(told: Any, seconds: float) -> str:
    time.sleep(seconds)
    return name_of(told)


@celery.task(acks_late=True, retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
def plain_retries(told: Any, *, name: str) -> None:
    ledger.write("ran", name, str(told).replace(", ", ",").replace(" ", "_"))
    misdeeds.DEEDS["kill"](0.0)


@celery.task
def note(task_id: Any, *, name: str, rest: Any = None) -> None:
    """An errback, or the callback of a chord."""
    ledger.write("noted", name)


TASKS = {"echo": echo, "batched": batched, "plain": plain}
