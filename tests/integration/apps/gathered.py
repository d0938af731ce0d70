"""An app on the GPU pool whose bodies serve many inputs at once, and tell a ledger of each call.

Environment: ``SETTINGS`` is JSON of Celery's configuration; ``LEDGER`` the file that is told.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import Any

import ledger
import resting
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry

import gw_celery as gw

celery = Celery("gathered", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.gw_cancel_timeout = 1.0
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("gathered", celery)
CPU = gw.Gpu("CPU")


def _called(method: str, names: list[str]) -> None:
    batch = gw.current_batch()
    ledger.write("called", method, batch.flush if batch else "none", *names)
    for name in names:
        ledger.write("began", name)


def _answered(names: list[str]) -> list[Any]:
    for name in names:
        ledger.write("ended", name)
    return list(names)


@app.cls(gpu=CPU)
class Model:
    """Several batched and plain methods; ``scale`` is a parameter of the call."""

    scale: int = gw.parameter(default=1, scope="call")

    @gw.method()
    @gw.batched(max_batch_size=64, wait_ms=300)
    async def rest(self, names: list[str], seconds: float = 0.0) -> list[str]:
        """Rest as long as the longest of the batch."""
        _called("rest", names)
        await asyncio.sleep(max(seconds))  # type: ignore[type-var]
        return _answered(names)

    @gw.method()
    @gw.batched(max_batch_size=8, wait_ms=300)
    def compute(self, names: list[str], seconds: float = 0.0) -> list[str]:
        """The same in a thread, one batch at a time."""
        _called("compute", names)
        time.sleep(max(seconds))  # type: ignore[type-var]
        return _answered(names)

    @gw.method()
    @gw.batched(max_batch_size=64, wait_ms=200)
    async def scaled(self, numbers: list[int]) -> list[int]:
        _called("scaled", [f"{self.scale}:{one}" for one in numbers])
        return [one * self.scale for one in numbers]

    @gw.method()
    @gw.batched(max_batch_size=4)
    async def nested(self, names: list[str]) -> list[str]:
        return [await Model().rest(name) for name in names]

    @gw.method()
    async def plain(self, name: str) -> str:
        """One input at a time, and a batched method of the same service awaited from it."""
        ledger.write("began", name)
        (first, second) = await asyncio.gather(Model().rest(f"{name}-a"), Model().rest(f"{name}-b"))
        return f"{first} {second}"


@app.cls(gpu=CPU)
class Patient:
    """Waits for others for longer than any test."""

    @gw.method()
    @gw.batched(max_batch_size=8, wait_ms=600_000)
    async def gather(self, names: list[str]) -> list[str]:
        """Answer; a batch with a ``slow`` in it rests first."""
        _called("gather", names)
        if len(names) > 1 and "slow" in names:
            await asyncio.sleep(60)
        return _answered(names)


@app.cls(gpu=CPU)
class Busy:
    """One short batch at a time, so that inputs gather while the first rests."""

    @gw.method()
    @gw.batched(max_batch_size=64)
    async def rest(self, names: list[str], seconds: float = 0.0) -> list[str]:
        _called("rest", names)
        await asyncio.sleep(max(seconds))  # type: ignore[type-var]
        return _answered(names)


@app.cls(gpu=CPU)
class Kept:
    """One batch at a time; one with the input "kept" rests until a test releases it."""

    @gw.method()
    @gw.batched(max_batch_size=64)
    async def answer(self, names: list[str]) -> list[str]:
        _called("answer", names)
        if "kept" in names:
            await resting.until_released()
        return _answered(names)


DEEDS: dict[str, Any] = {
    "ignore": Ignore("not this one"),
    "reject": Reject("not this one", requeue=False),
    "error": ValueError("the answer of one"),
}


@app.cls(gpu=CPU)
class Fragile:
    """A call fails for a word that one of its inputs is."""

    @gw.method(max_retries=3)
    @gw.batched(max_batch_size=64, wait_ms=1000)
    def judge(self, words: list[str]) -> list[Any]:
        _called("judge", words)
        if "kill" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "raise" in words:
            raise ValueError("one of them is bad")
        return [DEEDS.get(word, word) for word in words]

    @gw.method(autoretry_for=(ConnectionError,), retry_backoff=False, default_retry_delay=0)
    @gw.batched(max_batch_size=64, wait_ms=100)
    async def retry(self, words: list[str]) -> list[Any]:
        """Every word fails the first time that it is seen."""
        seen = {line[2] for line in ledger.words(ledger.Path(os.environ["LEDGER"]), "began")}
        _called("retry", words)
        return [word if word in seen else ConnectionError(word) for word in words]

    @gw.method(max_retries=2)
    @gw.batched(max_batch_size=8, wait_ms=100)
    async def ask(self, words: list[str]) -> list[Any]:
        """Ask for another try."""
        _called("ask", words)
        return [Retry(exc=OSError(word), when=0) if word == "again" else word for word in words]


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@app.cls(gpu=CPU)
class Small:
    """Its device has room for four."""

    @gw.method()
    @gw.batched(max_batch_size=16, wait_ms=1000)
    def fit(self, names: list[str]) -> list[str]:
        _called("fit", names)
        if len(names) > 4:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _answered(names)
