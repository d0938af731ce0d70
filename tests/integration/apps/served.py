"""An app as a team would write it, that tells a ledger what it does.

Environment: ``LOAD`` seconds that the context takes to enter, ``LOAD_AGAIN`` from the second entry
on; ``FAIL`` names what fails to load (``context`` or ``hook``).
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any

import ledger
from celery import Celery, current_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from pydantic import BaseModel

import gw_celery as gw

celery = Celery("served", set_as_current=False)
gw.preset(celery)
app = gw.App("served", celery)


class ModelError(Exception):
    """Raised by a body, and known to callers because it is defined beside a service."""


def _load_time() -> float:
    entries = ledger.words(ledger.Path(os.environ["LEDGER"]), "entering")
    name = "LOAD_AGAIN" if len(entries) > 1 and "LOAD_AGAIN" in os.environ else "LOAD"
    return float(os.environ.get(name, "0"))


@app.context("weights", size=3)
class Model:
    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    async def __aenter__(self) -> Model:
        ledger.write("entering", "Model")
        await asyncio.sleep(_load_time())
        if os.environ.get("FAIL") == "context":
            raise OSError("the weights are not there")
        self.beats = 0
        self.heart = asyncio.create_task(self._beat())
        ledger.write("entered", "Model")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.heart.cancel()
        ledger.write("left", "Model")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            self.beats += 1


@app.context()
class Tokenizer:
    async def __aenter__(self) -> str:
        ledger.write("entering", "Tokenizer")
        await asyncio.sleep(_load_time())
        ledger.write("entered", "Tokenizer")
        return "tokenizer"

    async def __aexit__(self, *exc: object) -> None:
        ledger.write("left", "Tokenizer")


@app.remote(gpu=gw.Gpu("CPU"), benchmark_dataset=[{"x": 2}])
async def square(x: Any) -> Any:
    assert app.get_context(Model).size == 3
    return x * x


@app.remote(gpu=gw.Gpu("CPU"))
async def echo(value: Any) -> Any:
    return value


@app.remote(gpu=gw.Gpu("CPU"))
async def beats() -> int:
    return int(app.get_context(Model).beats)


@app.remote(gpu=gw.Gpu("CPU"))
async def who() -> int:
    return os.getpid()


@app.remote(gpu=gw.Gpu("CPU"))
async def rest(seconds: float, name: str = "rest") -> str:
    ledger.write("began", name)
    try:
        await asyncio.sleep(seconds)
    except SoftTimeLimitExceeded:
        ledger.write("softly", name)
        return "soft"
    except asyncio.CancelledError:
        ledger.write("cancelled", name)
        raise
    ledger.write("ended", name)
    return name


@app.remote(gpu=gw.Gpu("CPU"))
async def record(name: str, seconds: float = 0.0) -> str:
    ledger.write("began", name)
    await asyncio.sleep(seconds)
    ledger.write("ended", name)
    return name


@app.remote(gpu=gw.Gpu("CPU"))
async def fail(kind: str) -> None:
    if kind == "known":
        raise ModelError("no such token", 7)
    if kind == "exit":
        raise SystemExit(3)
    if kind == "local":
        raise type("Unheard", (Exception,), {})("of")
    raise ValueError(kind)


@app.remote(gpu=gw.Gpu("CPU"), bind=True, max_retries=3)
async def retried(self: Any, until: int) -> tuple[int, bool]:
    if self.request.retries < until:
        raise self.retry(countdown=0.05)
    return self.request.retries, current_task.request.id == self.request.id


@app.remote(
    gpu=gw.Gpu("CPU"),
    autoretry_for=(ZeroDivisionError,),
    retry_kwargs={"countdown": 0.05, "max_retries": 2},
)
async def autoretried(until: int) -> float:
    retries = current_task.request.retries
    return retries / (0 if retries < until else 1)


@app.remote(gpu=gw.Gpu("CPU"))
async def ignored() -> None:
    current_task.update_state(state="CUSTOM")
    raise Ignore


@app.remote(gpu=gw.Gpu("CPU"))
async def rejected() -> None:
    ledger.write("rejected")
    raise Reject("not for me", requeue=False)


@app.remote(gpu=gw.Gpu("CPU"), bind=True)
async def replaced(self: Any, x: int) -> Any:
    return self.replace(square.s(x))


class Query(BaseModel):
    text: str
    top_k: int = 3


@app.remote(gpu=gw.Gpu("CPU"), pydantic=True)
async def typed(query: Query) -> Query:
    assert isinstance(query, Query)
    return Query(text=query.text.upper(), top_k=query.top_k)


@app.remote(gpu=gw.Gpu("CPU"))
async def current(depth: int) -> list[str]:
    """The id that the body, its gathered children and its threads see."""

    async def seen() -> str:
        await asyncio.sleep(0.01)
        return str(current_task.request.id)

    in_thread = await asyncio.to_thread(lambda: str(current_task.request.id))
    return [await seen(), *await asyncio.gather(*(seen() for _ in range(depth))), in_thread]


@dataclass
class Label:
    name: str
    score: float


@app.cls(gpu=gw.Gpu("CPU"), min_workers=1)
@gw.concurrent(max_inputs=4)
class Classifier:
    threshold: float = gw.parameter(default=0.5)
    model: str = gw.parameter(default="small")

    @gw.on_enter()
    def load(self) -> None:
        ledger.write("loading", self.model)
        if os.environ.get("FAIL") == "hook":
            raise RuntimeError("CUDA is not there")
        self.weights = self.model * 2

    @gw.on_exit()
    def unload(self) -> None:
        ledger.write("unloaded", self.weights)

    @gw.method()
    def classify(self, score: float) -> str:
        return "positive" if score > self.threshold else "negative"

    @gw.method()
    async def label(self, score: float) -> Label:
        name = self.classify(score)
        return Label(name, await square(score))

    @gw.method()
    def loaded(self) -> str:
        return str(self.weights)

    @gw.method()
    def slow(self, seconds: float) -> str:
        ledger.write("began", "slow")
        time.sleep(seconds)
        ledger.write("ended", "slow")
        return "slow"

    @gw.method()
    @gw.batched(max_batch_size=2)
    def batch(self, values: list[int]) -> list[int]:
        return [value + 1 for value in values]


@celery.task
def plain(x: int) -> int:
    return x + 1


@celery.task
def has_contexts() -> list[str]:
    """What an ordinary worker sees of the contexts."""
    try:
        app.get_context(Model)
    except KeyError as exc:
        return [str(exc)]
    return ["entered"]
