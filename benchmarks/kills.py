"""Inputs lost, and run twice, while replicas and their worker are killed.

    python -m benchmarks.kills [--inputs 100000] [--replica-every 3] [--worker-every 30]
                               [--broker amqp://guest:guest@127.0.0.1//]

Prints the counts from an append-only file, and the memory of parent and children over time.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import kills_app
from gw_celery import devserver

NODE = "kills@bench"


class Victims:
    """A worker that is started again whenever it is killed, and the killers."""

    def __init__(self, broker: str, results: str, ledger: Path, log: Path) -> None:
        self._urls = ["-b", broker, "--result-backend", results]
        self._log = log
        self._env = {**os.environ, "LEDGER": str(ledger)}
        self._over = threading.Event()
        self._chosen = random.Random(0)
        self.worker = self._start()
        self.replicas_killed = self.workers_killed = 0
        self.memory: list[tuple[float, float]] = []
        self._threads: list[threading.Thread] = []

    def haunt(self, replica_every: float, worker_every: float) -> None:
        """Kill from now on, in threads that ``end`` ends; 0 seconds for never."""
        for every, kill in ((replica_every, self._kill_replica), (worker_every, self._kill_worker)):
            if every:
                self._repeat(every, kill)
        self._repeat(1.0, self._weigh)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self.worker.terminate()
        self.worker.wait(60)

    def _repeat(self, every: float, what: Any) -> None:
        def run() -> None:
            while not self._over.wait(every):
                what()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.kills_app:celery"]
        command += self._urls
        command += ["worker", "-Q", "cpu", "-n", NODE, "-l", "WARNING"]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, env=self._env, stdout=log, stderr=log)

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.worker.pid).children()
        except psutil.NoSuchProcess:
            return []

    def _kill_replica(self) -> None:
        if children := self._children():
            self._chosen.choice(children).kill()
            self.replicas_killed += 1

    def _kill_worker(self) -> None:
        self.worker.kill()
        self.worker.wait()
        self.workers_killed += 1
        self.worker = self._start()

    def _weigh(self) -> None:
        try:
            parent = psutil.Process(self.worker.pid).memory_info().rss / 2**20
            children = [one.memory_info().rss / 2**20 for one in self._children()]
        except psutil.NoSuchProcess:
            return
        if children:
            self.memory.append((parent, max(children)))


def main() -> None:
    """Send, kill until all is done, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--replica-every", type=float, default=3.0)
    parser.add_argument("--worker-every", type=float, default=30.0)
    parser.add_argument("--broker", help="URL of a broker; without it, an embedded Redis")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        ledger = Path(folder) / "ledger"
        broker = options.broker or server.broker_url
        kills_app.celery.conf.update(broker_url=broker, result_backend=server.result_url)
        victims = Victims(broker, server.result_url, ledger, Path(folder) / "log")
        try:
            victims.haunt(options.replica_every, options.worker_every)
            started = time.monotonic()
            for number in range(options.inputs):
                kills_app.record.delay(number)
            wait(ledger, options.inputs)
            elapsed = time.monotonic() - started
        finally:
            victims.end()
        _print(ledger, options.inputs, victims, elapsed)


def wait(ledger: Path, inputs: int) -> None:
    """Return when every input has ended, or nothing has happened for two minutes."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 120:
        now = ledger.stat().st_size if ledger.exists() else 0
        if now != seen:
            seen, since = now, time.monotonic()
            if len(counts(ledger)["E"]) >= inputs:
                return
        time.sleep(2)


def counts(ledger: Path) -> dict[str, collections.Counter[str]]:
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in ledger.read_text().splitlines():
        kind, number = line.split()
        found[kind][number] += 1
    return found


def _print(ledger: Path, inputs: int, victims: Victims, elapsed: float) -> None:
    lines = counts(ledger)
    begun, ended = lines["B"], lines["E"]
    print(
        f"sent {inputs} in {elapsed:.0f} s; replicas killed {victims.replicas_killed}, workers "
        f"killed {victims.workers_killed}; finished once {sum(n == 1 for n in ended.values())}, "
        f"finished twice {sum(n > 1 for n in ended.values())}, started twice "
        f"{sum(n > 1 for n in begun.values())}, lost {inputs - len(ended)}"
    )
    quarter = max(1, len(victims.memory) // 4)
    for name, position in (("parent", 0), ("largest child", 1)):
        halves = [victims.memory[quarter * n : quarter * (n + 1)] for n in (2, 3)]
        third, last = (max(one[position] for one in half) for half in halves)
        print(f"{name}: at most {third:.0f} MiB in the third quarter, {last:.0f} MiB in the last")


if __name__ == "__main__":
    main()
