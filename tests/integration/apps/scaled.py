"""A model that takes ``START`` seconds to load and 50 ms for each input, four at a time.

Environment: ``SETTINGS`` is JSON of Celery's configuration. The ledger tells of starts and inputs.
"""

from __future__ import annotations

import asyncio
import json
import os

import ledger
import resting
from celery import Celery

import gw_celery as gw

celery = Celery("scaled", set_as_current=False)
gw.preset(celery)
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("scaled", celery)


@app.context()
class Model:
    async def __aenter__(self) -> Model:
        ledger.write("entering", "Model")
        await asyncio.sleep(float(os.environ.get("START", "0")))
        if os.environ.get("FAIL"):
            raise OSError("no such model")
        ledger.write("entered", "Model")
        return self

    async def __aexit__(self, *exc: object) -> None:
        ledger.write("left", "Model")


@app.remote(gpu=gw.Gpu("CPU"), max_workers=4)
@gw.concurrent(max_inputs=4)
async def infer(name: str, seconds: float = 0.05) -> str:
    return await resting.rest(name, seconds)
