"""A class task whose probes answer as files in ``SWITCHES`` say.

Each probe reads the file named after it: its words are ``ok``, ``false``, ``raise``, ``hang`` (an
``await`` without end), ``sleep`` (a thread without end), ``block`` (the event loop) or ``gil`` (a C
call that holds the GIL). One that has another word before it, ``pid=...`` or ``node=...``, is for
that process or worker only. ``PROBES`` is JSON of the arguments of each ``gw.Probe.on``.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import ledger
import resting
from celery import Celery

import gw_celery as gw

celery = Celery("probed", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.gw_cancel_timeout = 1.0
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("probed", celery)
CPU = gw.Gpu("CPU")


def switched(name: str) -> str:
    """What the file of this probe says to this process."""
    path = Path(os.environ["SWITCHES"]) / name
    for line in path.read_text().splitlines() if path.exists() else []:
        whom, _, what = line.rpartition(" ")
        if whom in ("", f"pid={os.getpid()}", f"node={os.environ.get('NODE')}"):
            return what
    return "ok"


def act(what: str) -> Any:
    """Be what a probe is told to be, but for what must be awaited."""
    if what == "raise":
        raise OSError("the device fell off the bus")
    if what in ("sleep", "block"):
        time.sleep(1000)
    if what == "gil":
        re.match(r"(a+)+$", "a" * 64 + "b")
    return {"ok": what != "false", "said": what}


@app.cls(gpu=CPU, probes=[gw.Probe.on(**one) for one in json.loads(os.environ.get("PROBES", "[]"))])
@gw.concurrent(max_inputs=4)
class Model:
    @gw.method()
    async def rest(self, name: str, seconds: float = 0.0) -> str:
        return await resting.rest(name, seconds)

    @gw.method()
    async def block(self, name: str, seconds: float) -> None:
        """Keep the event loop from its other work."""
        ledger.write("began", name)
        time.sleep(seconds)  # noqa: ASYNC251

    @gw.method()
    async def starts(self) -> Any:
        ledger.write("probed", "starts", time.monotonic())
        return act(switched("starts"))

    @gw.method()
    async def lives(self) -> Any:
        ledger.write("probed", "lives", time.monotonic())
        what = switched("lives")
        if what == "hang":
            await asyncio.Event().wait()
        return act(what)

    @gw.method()
    def lives_in_thread(self) -> Any:
        ledger.write("probed", "lives_in_thread", time.monotonic())
        return act(switched("lives_in_thread"))

    @gw.method()
    def is_ready(self) -> Any:
        ledger.write("probed", "is_ready", time.monotonic())
        return act(switched("is_ready"))


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def other(name: str, seconds: float = 0.0) -> str:
    """A service without probes beside it."""
    return await resting.rest(name, seconds)
