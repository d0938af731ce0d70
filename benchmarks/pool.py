"""The GPU pool against stock prefork: CPU and memory of the worker, and the time of one call.

    python -m benchmarks.pool [noop] [nap] [idle] [--tasks 3000] [--rounds 5]

Both workers run side by side on one embedded server, and take their backlogs in turn. CPU is user
and system time of a worker and its children; memory is the proportional set size (PSS) of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import pool_app
from gw_celery import devserver

PEERS = ("prefork", "gpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: how many children or slots, and which task each peer runs."""

    prefork_children: int
    tasks: dict[str, Any]
    queues: dict[str, str]


CASES = {
    "noop": Case(
        2,
        {"prefork": pool_app.noop, "gpu": pool_app.remote_noop},
        {"prefork": "plain", "gpu": "cpu.remote_noop"},
    ),
    "nap": Case(
        64,
        {"prefork": pool_app.nap, "gpu": pool_app.remote_nap},
        {"prefork": "plain", "gpu": "cpu.remote_nap"},
    ),
    "idle": Case(
        1,
        {"prefork": pool_app.noop, "gpu": pool_app.remote_noop},
        {"prefork": "plain", "gpu": "cpu.remote_noop"},
    ),
}


def main() -> None:
    """Print a table of medians, and the ratio of the pool to prefork."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[], choices=[*CASES, []])
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        pool_app.celery.conf.update(broker_url=server.broker_url, result_backend=server.result_url)
        for name in options.cases or CASES:
            _run(name, CASES[name], server, options)


def _run(name: str, case: Case, server: Any, options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        workers = {peer: stack.enter_context(_worker(peer, case, server)) for peer in PEERS}
        measure: Callable[..., float] = _call_time if name == "idle" else _cost
        count = min(options.tasks, 300) if name == "idle" else options.tasks
        for peer in PEERS:
            measure(workers[peer], peer, case, min(count, 200))
        figures: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for _ in range(options.rounds):
            for peer in PEERS:
                figures[peer].append(measure(workers[peer], peer, case, count))
        _print(name, figures, {peer: _pss(workers[peer].pid) for peer in PEERS})


def _print(name: str, figures: dict[str, list[float]], memory: dict[str, float]) -> None:
    medians = {peer: statistics.median(costs) for peer, costs in figures.items()}
    unit = "us p50" if name == "idle" else "us CPU/task"
    rounds = [
        ours / theirs for ours, theirs in zip(figures["gpu"], figures["prefork"], strict=True)
    ]
    print(
        f"{name}: prefork {1e6 * medians['prefork']:.0f} {unit}, "
        f"gpu {1e6 * medians['gpu']:.0f} {unit}: {statistics.median(rounds):.2f}x "
        f"(rounds {min(rounds):.2f}-{max(rounds):.2f}x); "
        f"PSS prefork {memory['prefork'] / 2**20:.0f} MiB, gpu {memory['gpu'] / 2**20:.0f} MiB: "
        f"{memory['gpu'] / memory['prefork']:.2f}x"
    )


@contextmanager
def _worker(peer: str, case: Case, server: Any) -> Iterator[subprocess.Popen[bytes]]:
    node = f"{peer}@bench"
    slots = 65 if peer == "gpu" else case.prefork_children
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.pool_app:celery"]
    command += ["-b", server.broker_url, "--result-backend", server.result_url]
    command += ["worker", "-c", str(slots), "-Q", case.queues[peer], "-n", node, "-l", "WARNING"]
    command += ["--without-mingle", "--without-gossip", "--prefetch-multiplier", "1"]
    env = {**os.environ, "BENCH_POOL": peer}
    worker = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        control = pool_app.celery.control
        while not control.ping(destination=[node], timeout=0.5, limit=1):
            if worker.poll() is not None:
                raise SystemExit(f"the {peer} worker ended with {worker.returncode}")
        yield worker
    finally:
        worker.terminate()
        worker.wait(60)


def _cost(worker: subprocess.Popen[bytes], peer: str, case: Case, tasks: int) -> float:
    """Seconds of worker CPU for one task of a backlog."""
    control, queue, node = pool_app.celery.control, case.queues[peer], f"{peer}@bench"
    control.cancel_consumer(queue, destination=[node], reply=True)
    sent = [case.tasks[peer].delay(number) for number in range(tasks)]
    before = _cpu(worker.pid)
    control.add_consumer(queue, destination=[node], reply=True)
    deadline = time.monotonic() + 300
    for one in reversed(sent):
        one.get(timeout=deadline - time.monotonic())
    return (_cpu(worker.pid) - before) / tasks


def _call_time(_: subprocess.Popen[bytes], peer: str, case: Case, calls: int) -> float:
    """Median seconds of one call at a time, from ``delay`` to its answer."""
    times = []
    for number in range(calls):
        started = time.perf_counter()
        case.tasks[peer].delay(number).get(timeout=30)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _cpu(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _family(pid))


def _pss(pid: int) -> float:
    return float(sum(process.memory_full_info().pss for process in _family(pid)))


if __name__ == "__main__":
    main()
