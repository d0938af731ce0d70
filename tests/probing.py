"""Workers whose replicas have probes, and the switches that say what these answer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ledger
import probed

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

QUEUES = "cpu,celery"


def probe(method: str, kind: str, **given: Any) -> dict[str, Any]:
    """The arguments of a ``gw.Probe.on`` that is called often."""
    return {"method": method, "kind": kind, "period_s": 0.4, "timeout_s": 1.0, **given}


class Site:
    """A place where workers with probes are started.

    Args:
        start_worker: the fixture.
        directory: where the ledger and the switches lie.
    """

    def __init__(self, start_worker: StartWorker, directory: Path) -> None:
        self._start = start_worker
        self._directory = directory
        self.ledger = directory / "ledger"
        self.nodes: dict[str, WorkerProcess] = {}

    def start(
        self,
        *probes: dict[str, Any],
        node: str = "a",
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> WorkerProcess:
        """Start a worker whose class task has these probes."""
        given = {
            "PROBES": json.dumps(probes),
            "SWITCHES": str(self._directory),
            "NODE": node,
            **(env or {}),
        }
        options = {"queues": QUEUES, **options}
        worker = pooling.start(self._start, self.ledger, env=given, module="probed", **options)
        self.nodes[node] = worker
        return worker

    def switch(self, probe: str, *lines: str) -> None:
        """Have a probe answer so from now on."""
        fresh = self._directory / f"{probe}.new"
        fresh.write_text("\n".join(lines))
        fresh.replace(self._directory / probe)

    def times(self, probe: str) -> dict[int, list[float]]:
        """When each process was asked, in the order in which they first were."""
        times: dict[int, list[float]] = {}
        for pid, _, name, when in ledger.words(self.ledger, "probed"):
            if name == probe:
                times.setdefault(int(pid), []).append(float(when))
        return times

    def began(self, names: Sequence[str]) -> dict[str, list[int]]:
        """The processes in which each of these inputs began."""
        return {name: pooling.began(self.ledger, name) for name in names}


def replicas(worker: WorkerProcess) -> list[dict[str, Any]]:
    return pooling.replicas(worker, probed.celery)


def states(worker: WorkerProcess) -> list[str]:
    return [one["state"] for one in replicas(worker)]


def pids(worker: WorkerProcess, count: int = 1) -> list[int]:
    """The processes of this many replicas, once all of them are READY."""

    def found() -> list[int]:
        ready = pooling.ready_pids(worker, probed.celery)
        return ready if len(ready) == count else []

    return eventually(found, 30)


def open_queues(worker: WorkerProcess) -> set[str]:
    return {one["name"] for one in pooling.ask(worker, "active_queues", probed.celery) or ()}


wait: Callable[..., Any] = functools.partial(eventually, timeout=30)
