"""An app whose arguments and answers are secrets; ``POOL`` and ``SETTINGS`` configure it."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from celery import Celery
from celery.exceptions import MaxRetriesExceededError

import gw_celery as gw

celery = Celery("shy", set_as_current=False)
gw.preset(celery)
celery.conf.update(
    worker_pool=os.environ.get("POOL", "gw_celery.pool:TaskPool"),
    task_send_sent_event=True,
    **json.loads(os.environ.get("SETTINGS", "{}")),
)
app = gw.App("shy", celery)
CPU = gw.Gpu("CPU")


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=10)
async def echo(text: Any, *, seconds: float = 0.0, other: str = "") -> Any:
    await asyncio.sleep(seconds)
    return text


@app.remote(gpu=CPU)
@gw.batched(max_batch_size=4, wait_ms=1)
async def together(texts: list[str]) -> list[str]:
    return texts


@app.cls(gpu=CPU)
class Desk:
    @gw.method()
    def echo(self, text: str) -> dict[str, str]:
        return {text: text}


@app.remote(gpu=CPU)
async def awaits(text: str) -> str:
    """Await another task, and send a third."""
    echo.delay(text)
    return str(await echo(text))


@app.remote(gpu=CPU, bind=True, max_retries=2)
async def retried(self: Any, text: str, *, is_last: bool = True) -> str:
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return text


@app.remote(gpu=CPU, bind=True, max_retries=1)
async def given_up(self: Any, text: str) -> None:
    try:
        self.retry(countdown=0)
    except MaxRetriesExceededError as exc:
        assert text not in str(exc) or self.app.conf.get("gw_show_values")  # noqa: PT017
        raise


@app.remote(gpu=CPU, resultrepr_maxsize=100)
async def shown(text: str) -> str:
    return text
