"""A client of ``served`` in a process of its own: prints what it got as one JSON line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

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


async def _spawned() -> list[int]:
    handles = [served.square.spawn(x) for x in range(5)]
    return [await one for one in handles]


def _got_elsewhere() -> int:
    """The answer of a call that is sent by one thread and waited for by another."""
    call = served.square.spawn(7)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(call.get(timeout=20)))
    thread.start()
    thread.join()
    return answers[0]


def _revoked() -> str:
    """What becomes of a call whose caller does not wait for it any more."""
    late = served.record.options(countdown=2, task_id="late", timeout=0.1)
    with contextlib.suppress(TimeoutError):
        asyncio.run(_awaited_one(late))
    result = served.record.AsyncResult("late")
    deadline = time.monotonic() + 20
    while not result.ready() and time.monotonic() < deadline:
        time.sleep(0.05)
    return str(result.state)


async def _awaited_one(fn: Any) -> object:
    return await fn("late")


def _frozen() -> dict[str, tuple[str, float]]:
    """How calls with a time-out end while the broker accepts and never answers."""
    fn = served.echo.options(timeout=0.5, queue="unread")
    fn.delay("connect")
    os.kill(int(os.environ["FREEZE"]), signal.SIGSTOP)
    return {
        "remote": _ending(lambda: fn.remote(1)),
        "await": _ending(lambda: asyncio.run(_awaited_one(fn))),
        "spawn": _ending(lambda: fn.spawn(1)),
    }


def _ending(call: Callable[[], object]) -> tuple[str, float]:
    before = time.monotonic()
    try:
        call()
    except Exception as exc:
        return type(exc).__name__, time.monotonic() - before
    return "nothing", time.monotonic() - before


def ask(what: str) -> object:
    """Make the calls named ``what`` and return their answers."""
    if what == "frozen":
        return _frozen()
    if what == "revoked":
        return _revoked()
    if what == "record":
        return served.record.delay("survivor", 1.0).get(timeout=60)
    if what == "away":
        return _failing()
    return {
        "delay": served.square.delay(3).get(timeout=20),
        "remote": served.Classifier(threshold=0.9).classify.remote(0.8),
        "awaited": asyncio.run(_awaited()),
        "spawned": asyncio.run(_spawned()),
        "spawned and got": served.square.spawn(6).get(timeout=20),
        "got by another thread": _got_elsewhere(),
        "chain": chain(served.square.s(2), served.square.s())().get(timeout=20),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ask(sys.argv[1])) + "\n")
