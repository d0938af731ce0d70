"""An app on the GPU pool whose bodies raise errors with long texts and control characters."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery

import gw_celery as gw

celery = Celery("raising", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("raising", celery)


class OwnText(Exception):
    """Its text is longer than its arguments."""

    def __str__(self) -> str:
        return "x" * self.args[0]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


def commit(how: str, size: int) -> Any:
    text = "x" * size
    if how == "chained":
        try:
            raise KeyError(text)
        except KeyError as exc:
            raise ValueError("short") from exc
    errors: dict[str, BaseException] = {
        "text": ValueError(text),
        "key": KeyError(text),
        "object": ValueError({"list": [text]}),
        "bytes": ValueError(text.encode()),
        "many": ValueError(*["x" * 100] * (size // 100)),
        "lines": ValueError("\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged\n" * 1000),
        "escapes": ValueError("\x1b[2J\x00\r\u2028forged"),
        "own text": OwnText(size),
        "unprintable": Unprintable("x"),
    }
    raise errors[how]


@app.remote(gpu=gw.Gpu("CPU"))
async def fail(how: str, size: int) -> None:
    commit(how, size)


@app.remote(gpu=gw.Gpu("CPU"))
async def fine(x: int) -> int:
    return x


@celery.task
def plain(how: str, size: int) -> None:
    commit(how, size)
