"""What bodies and loads do that breaks a worker which is not made for it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ledger


class Odd(Exception):
    """Cannot be pickled, and its text raises."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Panic(BaseException):
    """As a library written in Rust raises: no ``except Exception`` sees it."""


def fail_to_load(how: str) -> None:
    if how == "raise":
        raise OSError("the weights are not there")
    if how == "exit":
        os._exit(7)
    if how == "hang":
        time.sleep(600)


async def commit(how: str, name: str, seconds: float) -> Any:
    """Do ``how``; what comes back from it is the answer."""
    if how == "swallow":
        return await _swallow(name, seconds)
    return DEEDS[how](seconds)


async def _swallow(name: str, seconds: float) -> str:
    """Go on through every cancellation."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            ledger.write("swallowed", name)
    return name


def _hold_the_gil(seconds: float) -> None:
    # Unlike time.sleep and CDLL, PyDLL keeps the GIL: no thread of this process runs.
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))


def _backtrack(seconds: float) -> None:
    """Match for about forever, as a regular expression of a user can."""
    re.match(r"(a+)+$", "a" * 40 + "b")


def _raise(exc: Callable[[], BaseException]) -> Callable[[float], None]:
    def act(seconds: float) -> None:
        raise exc()

    return act


def _write_garbage(seconds: float) -> None:
    """Write into every socket that the process has, the parent's among them."""
    for number in range(3, 200):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                os.write(number, b"\xff" * 64)


DEEDS: dict[str, Callable[[float], Any]] = {
    "gil": _hold_the_gil,
    "regex": _backtrack,
    "block": time.sleep,
    "kill": lambda seconds: os.kill(os.getpid(), signal.SIGKILL),
    "abort": lambda seconds: os.abort(),
    "leave": lambda seconds: os._exit(3),
    "memory": _raise(MemoryError),
    "exit": _raise(lambda: SystemExit(3)),
    "interrupt": _raise(KeyboardInterrupt),
    "odd": _raise(Odd),
    "panic": _raise(lambda: Panic("index out of bounds")),
    "group": _raise(lambda: BaseExceptionGroup("both", [Panic(), ValueError()])),
    "close": _raise(GeneratorExit),
    "cancel": _raise(asyncio.CancelledError),
    "unserialisable": lambda seconds: threading.Lock(),
    "garbage": _write_garbage,
}
