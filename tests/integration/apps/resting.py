"""A body that takes its time, and tells the ledger how it came to its end."""

from __future__ import annotations

import asyncio
import os

import ledger
from celery.exceptions import SoftTimeLimitExceeded


async def rest(name: str, seconds: float) -> str:
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


async def until_released() -> None:
    """Rest until a test writes "go" into the ledger."""
    while not ledger.words(ledger.Path(os.environ["LEDGER"]), "go"):  # noqa: ASYNC110 - a file
        await asyncio.sleep(0.05)
