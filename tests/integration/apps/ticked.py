"""An app with a probe and a benchmark, for beat and for workers of any pool.

Environment: ``SETTINGS`` is JSON of Celery's configuration; ``LOAD`` seconds that a replica takes
to load; ``DECLARED`` is what there is of ``probe`` and ``benchmark``; with ``LATE`` the module
reads its tasks before they are declared, as a project may by accident.
"""

from __future__ import annotations

import asyncio
import json
import os

import ledger
from celery import Celery, signals

import gw_celery as gw

DECLARED = os.environ.get("DECLARED", "probe,benchmark").split(",")

celery = Celery("ticked", set_as_current=False)
gw.preset(celery)
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("ticked", celery)
if os.environ.get("LATE"):
    assert "ticked.hold" not in celery.tasks


def _on_postrun(sender: object, **_: object) -> None:
    name = getattr(sender, "name", "")
    if name.startswith("gw_celery."):
        ledger.write("swept", name)


# In workers only: a receiver changes how tasks run, also those of other tests in this process.
if "LEDGER" in os.environ:
    signals.task_postrun.connect(_on_postrun)


@app.context()
class Model:
    async def __aenter__(self) -> Model:
        await asyncio.sleep(float(os.environ.get("LOAD", "0")))
        return self

    async def __aexit__(self, *exc: object) -> None: ...


@app.cls(
    gpu=gw.Gpu("CPU"),
    probes=[gw.Probe.on("check", period_s=1)] if "probe" in DECLARED else [],
)
class Watched:
    @gw.method()
    def check(self) -> bool:
        return True


@app.remote(
    gpu=gw.Gpu("CPU"),
    benchmark_dataset=[{"seconds": 0.0}] if "benchmark" in DECLARED else None,
    benchmark_runs=1,
    benchmark_concurrency=1,
)
async def hold(seconds: float = 0.0) -> None:
    await asyncio.sleep(seconds)
