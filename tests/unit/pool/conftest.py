from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pool_harness import Harness


@pytest.fixture
def start_pool() -> Iterator[Callable[..., Harness]]:
    """Return a function that starts a pool as ``Harness`` says, with all its replicas READY.

    At the end of a test that passed, no input and no slot may be lost.
    """
    started: list[Harness] = []
    with contextlib.ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> Harness:
            harness = stack.enter_context(Harness(*args, **kwargs).running())
            for child in harness.children:
                child.ready()
            started.append(harness)
            return harness

        yield start
        for harness in started:
            if not harness.is_stopped:
                harness.check_settled()


@pytest.fixture
def harness(start_pool: Callable[..., Harness]) -> Harness:
    """A pool of one replica, READY, with two slots of the service ``work``."""
    return start_pool()
