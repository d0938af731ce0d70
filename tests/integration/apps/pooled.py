"""An app on the GPU pool, whose bodies tell a ledger what they do and misbehave when asked to.

Environment: ``SETTINGS`` is JSON of Celery's configuration; ``LOAD`` seconds that the context takes
to enter; ``FAIL`` is how it fails: ``raise``, ``exit``, ``hang``, or ``signal`` for a receiver of
``worker_process_init`` that raises; ``FAILS`` is how often, before it succeeds;
``BREAK_IN_CHILD`` makes the module fail where it is imported by a child.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import time
from typing import Any

import ledger
import misdeeds
import resting
from celery import Celery, current_task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

import gw_celery as gw

if "BREAK_IN_CHILD" in os.environ and multiprocessing.current_process().name != "MainProcess":
    raise ImportError("this module cannot be imported twice")

celery = Celery("pooled", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.gw_cancel_timeout = 1.0
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("pooled", celery)
CPU = gw.Gpu("CPU")


@signals.worker_process_init.connect
def _on_process_init(**_: Any) -> None:
    if os.environ.get("FAIL") == "signal":
        raise OSError("the receiver cannot")


@app.context()
class Model:
    async def __aenter__(self) -> Model:
        ledger.write("entering", "Model")
        await asyncio.sleep(float(os.environ.get("LOAD", "0")))
        entries = len(ledger.words(ledger.Path(os.environ["LEDGER"]), "entering"))
        if entries <= int(os.environ.get("FAILS", "1000")):
            misdeeds.fail_to_load(os.environ.get("FAIL", ""))
        ledger.write("entered", "Model")
        return self

    async def __aexit__(self, *exc: object) -> None:
        ledger.write("left", "Model")


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=1000)
async def hold(name: str, seconds: float = 0.0) -> str:
    """Rest, beside a thousand others."""
    app.get_context(Model)
    return await resting.rest(name, seconds)


_met: list[asyncio.Event] = []


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=1000)
async def meet(count: int) -> int:
    """End once ``count`` inputs are in this body at the same time; before that, never."""
    mine = asyncio.Event()
    _met.append(mine)
    if len(_met) == count:
        for one in _met:
            one.set()
    await mine.wait()
    return os.getpid()


@app.remote(gpu=CPU, timeout=None)
async def unlimited(name: str, seconds: float = 0.0) -> str:
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU)
async def single(name: str, seconds: float = 0.0) -> str:
    """Rest, one at a time."""
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def kept(name: str, is_kept: bool = False) -> str:
    """Answer; or first rest until a test releases it."""
    ledger.write("began", name)
    if is_kept:
        await resting.until_released()
    ledger.write("ended", name)
    return name


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def four(name: str, seconds: float = 0.0) -> str:
    """Rest, four at a time in one child."""
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU, acks_late=False)
@gw.concurrent(max_inputs=4)
async def early(name: str, seconds: float = 0.0) -> str:
    """Acknowledged when it begins."""
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU, reject_on_worker_lost=False)
@gw.concurrent(max_inputs=4)
async def unforgiven(name: str, seconds: float = 0.0) -> str:
    """Acknowledged when it ends, and not given to another child."""
    return await resting.rest(name, seconds)


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def misbehave(how: str, name: str, seconds: float = 0.0) -> Any:
    """Do what no body should: see ``misdeeds``."""
    ledger.write("began", name)
    answer = await misdeeds.commit(how, name, seconds)
    ledger.write("ended", name)
    return answer


@app.cls(gpu=CPU)
@gw.concurrent(max_inputs=4)
class Desk:
    @gw.on_enter()
    def open(self) -> None:
        ledger.write("opened")

    @gw.on_exit()
    def close(self) -> None:
        ledger.write("closed")

    @gw.method()
    def sit(self, name: str, seconds: float = 0.0) -> str:
        """Be busy in a thread, in steps that an exception can come between."""
        ledger.write("began", name)
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.02)
        except SoftTimeLimitExceeded:
            ledger.write("softly", name)
            return "soft"
        ledger.write("ended", name)
        return name

    @gw.method()
    def misbehave(self, how: str, name: str, seconds: float = 0.0) -> None:
        """Do it in a thread."""
        ledger.write("began", name)
        misdeeds.DEEDS[how](seconds)
        ledger.write("ended", name)

    @gw.method()
    def who(self) -> tuple[int, str]:
        time.sleep(0.01)
        return os.getpid(), str(current_task.request.id)


@app.remote(gpu=CPU, bind=True)
@gw.concurrent(max_inputs=64)
async def whoami(self: Any, marker: int) -> list[tuple[str, str]]:
    """The ids that the body, its gathered children and its threads see."""

    def seen() -> tuple[str, str]:
        return str(current_task.request.id), str(self.request.id)

    async def seen_later() -> tuple[str, str]:
        await asyncio.sleep(0.001 * (marker % 7))
        return seen()

    found = [seen(), await seen_later()]
    found += await asyncio.gather(*(seen_later() for _ in range(3)))
    found.append(await asyncio.to_thread(seen))
    return [*found, seen()]


@app.remote(gpu=CPU, bind=True, max_retries=5)
@gw.concurrent(max_inputs=64)
async def retried(self: Any, until: int) -> tuple[int, bool]:
    await asyncio.sleep(0.01)
    if self.request.retries < until:
        raise self.retry(countdown=0.05)
    return self.request.retries, current_task.request.id == self.request.id


@app.remote(
    gpu=CPU,
    autoretry_for=(ZeroDivisionError,),
    retry_kwargs={"countdown": 0.05, "max_retries": 2},
)
async def autoretried(until: int) -> float:
    retries = current_task.request.retries
    return retries / (0 if retries < until else 1)


@app.remote(gpu=CPU)
async def ignored() -> None:
    current_task.update_state(state="CUSTOM")
    raise Ignore


@app.remote(gpu=CPU)
async def rejected(name: str, requeue: bool = False) -> str:
    ledger.write("rejected", name)
    if requeue and len(_rejections(name)) > 1:
        return name
    raise Reject("not for me", requeue=requeue)


def _rejections(name: str) -> list[list[str]]:
    words = ledger.words(ledger.Path(os.environ["LEDGER"]), "rejected")
    return [line for line in words if line[2] == name]


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=64)
async def add(x: int, y: int = 1) -> int:
    await asyncio.sleep(0)
    return x + y


@app.remote(gpu=CPU)
async def total(numbers: list[int]) -> int:
    ledger.write("totalled", len(numbers))
    return sum(numbers)


@celery.task
def note(request: Any, exc: Any = None, traceback: Any = None, name: str = "") -> None:
    """An errback."""
    ledger.write("errback", name)


@celery.task
def plain(x: int) -> int:
    return x + 1


@celery.task(bind=True)
def plain_who(self: Any) -> tuple[str, str, bool]:
    return self.request.id, current_task.request.id, self.request.delivery_info["redelivered"]


@celery.task
def plain_rest(name: str, seconds: float = 0.0) -> str:
    ledger.write("began", name)
    time.sleep(seconds)
    ledger.write("ended", name)
    return name


@celery.task(bind=True, max_retries=3)
def plain_retried(self: Any, until: int) -> int:
    if self.request.retries < until:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@celery.task
def plain_fails(text: str) -> None:
    raise ValueError(text)


@celery.task
def plain_misbehave(how: str, name: str, seconds: float = 0.0) -> None:
    """Acknowledged when it begins."""
    ledger.write("began", name)
    misdeeds.DEEDS[how](seconds)


@celery.task(acks_late=True, retry_on_worker_lost=True, max_retries=2, default_retry_delay=0)
def plain_retries_its_death(name: str) -> None:
    """Celery 5.7 sends it again when its child dies."""
    ledger.write("began", name)
    misdeeds.DEEDS["kill"](0.0)


@celery.task
def plain_terminates(*, forks: bool) -> int:
    """Start a process and terminate it, as libraries do; returns its exit code."""
    if forks:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        child.terminate()
        child.join(10)
        return child.exitcode or 0
    with subprocess.Popen(["sleep", "30"]) as program:
        program.terminate()
        return program.wait(10)
