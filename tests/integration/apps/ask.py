"""A client of ``served`` in a process of its own: prints what it got as one JSON line."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import served
from celery import chain
from kombu.exceptions import OperationalError


async def _awaited() -> list[int]:
    return list(await asyncio.gather(*(served.square(x) for x in range(20))))


def _failing() -> tuple[str, float]:
    before = time.monotonic()
    try:
        asyncio.run(_awaited())
    except OperationalError as exc:
        return type(exc).__name__, time.monotonic() - before
    return "nothing", 0.0


def ask(what: str) -> object:
    """Make the calls named ``what`` and return their answers."""
    if what == "record":
        return served.record.delay("survivor", 1.0).get(timeout=60)
    if what == "away":
        return _failing()
    return {
        "delay": served.square.delay(3).get(timeout=20),
        "remote": served.Classifier(threshold=0.9).classify.remote(0.8),
        "awaited": asyncio.run(_awaited()),
        "chain": chain(served.square.s(2), served.square.s())().get(timeout=20),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ask(sys.argv[1])) + "\n")
