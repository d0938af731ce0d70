"""An app as a team would write it, that tells a ledger what it does.

Environment: ``LOAD`` seconds that the context takes to enter, ``LOAD_AGAIN`` from the second entry
on, ``LOAD_TOKENIZER`` of one of them alone, ``LOAD_HOOK`` of the large classifier; ``FAIL`` names
what fails to load (``context`` or ``hook``), or ``blocked``: a context that blocks the event loop;
``START_TIMEOUT`` is the setting.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any

import ledger
import misdeeds
import resting
from celery import Celery, current_task
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

import gw_celery as gw

celery = Celery("served", set_as_current=False)
gw.preset(celery)
celery.conf.gw_start_timeout = float(os.environ.get("START_TIMEOUT", "600"))
celery.conf.gw_cancel_timeout = float(os.environ.get("CANCEL_TIMEOUT", "5"))
app = gw.App("served", celery)


class ModelError(Exception):
    """Raised by a body, and known to callers because it is defined beside a service."""


class CodeError(Exception):
    """Its arguments are not those that it is made with."""

    def __init__(self, message: str, code: int = 500) -> None:
        super().__init__(f"E{code}: {message}")
        self.code = code


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
        if os.environ.get("FAIL") == "blocked":
            time.sleep(120)  # noqa: ASYNC251 the mistake that is tested
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
        await asyncio.sleep(float(os.environ.get("LOAD_TOKENIZER") or _load_time()))
        # Written once this method has returned: its reader may rely on it.
        asyncio.get_running_loop().call_soon(ledger.write, "entered", "Tokenizer")
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
    return await resting.rest(name, seconds)


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
    if kind == "coded":
        raise CodeError("nope", 404)
    if kind == "errors":
        raise ExceptionGroup("both", [ModelError("one"), ValueError("two")])
    if kind == "local":
        raise type("Unheard", (Exception,), {})("of")
    await misdeeds.commit(kind, kind, 0.0)


@app.remote(gpu=gw.Gpu("CPU"), timeout=None)
async def unlimited() -> None: ...


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


@app.remote(gpu=gw.Gpu("CPU"), bind=True)
async def parents(self: Any, is_first: bool = True) -> list[str]:
    """The id of this call, and what those that it makes name as their parent."""
    if not is_first:
        return [self.request.parent_id]
    sent = parents.spawn(False)
    return [self.request.id, *await parents.aremote(False), *await sent]


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
        if self.model == "large":
            time.sleep(float(os.environ.get("LOAD_HOOK", "0")))
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
    def on_second_thoughts(self, score: float) -> str:
        if current_task.request.retries == 0:
            raise current_task.retry(countdown=0.05)
        return self.classify(score)

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
    def leave(self, how: str) -> None:
        misdeeds.DEEDS[how](0.0)

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
