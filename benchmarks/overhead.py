"""Worker CPU of one no-op task: ours against a plain Celery task on the same stock pool.

    python -m benchmarks.overhead [--tasks 3000] [--rounds 5] [--pool prefork]

For each round and kind a worker is warmed up, stopped from consuming, given a backlog, and then
measured until the backlog is done: user and system time of the worker and its children. Rounds of
the kinds alternate, so that a change of the machine's speed touches all alike.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import overhead_app
from gw_celery import devserver

NODE = "overhead@bench"


def main() -> None:
    """Print the median CPU per task of each kind, and its ratio to the plain task's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pool", default="prefork")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        overhead_app.celery.conf.update(
            broker_url=server.broker_url, result_backend=server.result_url
        )
        worker = _start(server, options.pool)
        try:
            figures = _measure(worker, options.tasks, options.rounds)
        finally:
            worker.terminate()
            worker.wait(20)
    plain = statistics.median(figures["plain"])
    for kind, costs in figures.items():
        cost = statistics.median(costs)
        ratios = [one / base for one, base in zip(costs, figures["plain"], strict=True)]
        print(
            f"{kind:6} {1e6 * cost:7.0f} us/task  {cost / plain:5.2f}x  "
            f"(rounds {min(ratios):.2f}-{max(ratios):.2f}x)"
        )


def _start(server: devserver.Server, pool: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.overhead_app:celery"]
    command += ["-b", server.broker_url, "--result-backend", server.result_url]
    command += ["worker", "-P", pool, "-c", "1", "-Q", "cpu", "-n", NODE, "-l", "WARNING"]
    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    control = overhead_app.celery.control
    while not control.ping(destination=[NODE], timeout=0.5, limit=1):
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended with {worker.returncode}")
    return worker


def _measure(worker: subprocess.Popen[bytes], tasks: int, rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {kind: [] for kind in overhead_app.TASKS}
    for kind in overhead_app.TASKS:
        _cost(worker, kind, 200)
    for _ in range(rounds):
        for kind, costs in figures.items():
            costs.append(_cost(worker, kind, tasks))
    return figures


def _cost(worker: subprocess.Popen[bytes], kind: str, tasks: int) -> float:
    queue = "cpu.asynchronous" if kind == "async" else "cpu.Service"
    control = overhead_app.celery.control
    control.cancel_consumer(queue, destination=[NODE], reply=True)
    task = overhead_app.TASKS[kind]
    sent = [task.delay(number) for number in range(tasks)]
    before = _cpu(worker.pid)
    control.add_consumer(queue, destination=[NODE], reply=True)
    deadline = time.monotonic() + 300
    for number, one in enumerate(reversed(sent)):
        one.get(timeout=deadline - time.monotonic())
        if number == 10:  # the last ones are there, so all before them are, too: one queue
            break
    return (_cpu(worker.pid) - before) / tasks


def _cpu(pid: int) -> float:
    parent = psutil.Process(pid)
    return sum(
        sum(process.cpu_times()[:2]) for process in (parent, *parent.children(recursive=True))
    )


if __name__ == "__main__":
    main()
