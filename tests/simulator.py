"""The simulator's command in this process, and traces for it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT

EXAMPLE = ROOT / "docs" / "traces" / "bursts.csv"


@dataclasses.dataclass(frozen=True)
class Ended:
    """The command after its end."""

    code: int
    out: str
    err: str


def run(*options: object) -> Ended:
    """Run ``python -m gw_celery.autoscale.simulate`` with these options."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["simulate", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("gw_celery.autoscale.simulate", run_name="__main__")
    return Ended(int(str(ended.value.code)), out.getvalue(), err.getvalue())


def figures(*options: object) -> dict[str, Any]:
    """Return what the command prints with ``--json``."""
    ended = run(*options, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def write(path: Path, inputs: Iterable[tuple[float, float]]) -> Path:
    """Write a trace of inputs, each with its second and its workload."""
    lines = [f"{at!r},{workload!r}" for at, workload in inputs]
    path.write_text("\n".join(["seconds,workload", *lines]))
    return path


def poisson(seed: int, rate: float, count: int, workload: float = 1.0) -> list[tuple[float, float]]:
    lot, at, inputs = random.Random(seed), 0.0, []
    for _ in range(count):
        at += lot.expovariate(rate)
        inputs.append((at, workload))
    return inputs
