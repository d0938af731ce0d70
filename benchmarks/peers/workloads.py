"""What every system is asked to do; each of its processes learns from ``PEERS_WORKLOAD`` which."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import runpy
from pathlib import Path
from typing import Any

VARIABLE = "PEERS_WORKLOAD"
#: Names the file whose lock is the simulated device.
DEVICE = "PEERS_DEVICE"
_STARTERS = Path(__file__).parents[2] / "example_project" / "search" / "starters.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of work: what the body does, and how many calls the client keeps in flight."""

    name: str
    title: str
    in_flight: int
    #: 1 where nothing is batched.
    max_batch: int = 1
    wait_ms: int = 10
    #: Seconds that one call of the model takes, and each of its inputs adds.
    base: float = 0.0
    per_item: float = 0.0
    has_model: bool = False

    @property
    def ideal(self) -> float | None:
        """Inputs a second at best, where the declaration says so."""
        if self.name == "io":
            return self.in_flight / self.base
        if self.has_model and self.base:
            return self.max_batch / (self.base + self.max_batch * self.per_item)
        return None


WORKLOADS = {
    one.name: one
    for one in (
        Workload(name="noop", title="no-op, 64 in flight", in_flight=64),
        Workload(name="io", title="50 ms of I/O, 64 in flight", in_flight=64, base=0.05),
        Workload(
            name="fast",
            title="model of 20 ms + 0.1 ms an input, 256 in flight",
            in_flight=256,
            max_batch=64,
            base=0.02,
            per_item=0.0001,
            has_model=True,
        ),
        Workload(
            name="slow",
            title="model of 200 ms + 1 ms an input, 256 in flight",
            in_flight=256,
            max_batch=64,
            base=0.2,
            per_item=0.001,
            has_model=True,
        ),
        Workload(
            name="minilm",
            title="MiniLM on torch, one thread, 128 in flight",
            in_flight=128,
            max_batch=32,
            has_model=True,
        ),
    )
}


def chosen() -> Workload:
    """The workload of this process."""
    return WORKLOADS[os.environ[VARIABLE]]


def items(workload: Workload) -> list[Any]:
    """What the client sends, over and over."""
    return sentences() if workload.name == "minilm" else list(range(1000))


def sentences() -> list[str]:
    """The titles and sentences of the example project's texts: 1 to 30 words."""
    texts: list[str] = []
    for title, text in runpy.run_path(str(_STARTERS))["STARTERS"]:
        texts += [title, *re.split(r"(?<=[.:]) ", text)]
    random.Random(0).shuffle(texts)
    return texts
