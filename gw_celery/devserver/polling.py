"""Waiting by asking, up to a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
INTERVAL = 0.02


def poll(ask: Callable[[], T], timeout: float) -> T:
    """Ask until the answer is truthy or ``timeout`` has passed; the last answer."""
    deadline = time.monotonic() + timeout
    while not (answer := ask()) and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    return answer
