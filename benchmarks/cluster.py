"""What one worker with the GPU pool costs its broker at idle, and what a thousand would.

    python -m benchmarks.cluster [--broker redis] [--workers 1 2 4] [--seconds 20] [--nodes 1000]

Starts so many real workers on a broker of their own and counts what the broker counts: connections,
commands and bytes. Three sizes of cluster tell what each worker costs, and what each pair of them
does: with gossip everybody hears everybody. ``stock`` is Celery's default.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import cluster_brokers
from gw_celery.testing import Process, eventually

#: What a worker is started with.
KINDS = {
    "stock": (),
    "quiet": ("--without-gossip", "--without-mingle"),
    "lean": ("--without-gossip", "--without-mingle", "--without-heartbeat"),
}
#: Seconds until a worker that has started does what it always does.
SETTLING = 5.0


@dataclasses.dataclass(frozen=True)
class Idle:
    """What ``workers`` idle workers cost together; rates are a second."""

    workers: int
    connections: float
    channels: float
    queues: float
    commands: dict[str, float]
    received_bytes: float
    sent_bytes: float

    @property
    def commands_a_second(self) -> float:
        return sum(self.commands.values())


@dataclasses.dataclass(frozen=True)
class Fit:
    """A figure of ``n`` workers together: ``fixed + each * n + pair * n * n``."""

    fixed: float
    each: float
    pair: float

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]]) -> Fit:
        (n, low), (m, middle), (k, high) = points
        slope, steeper = (middle - low) / (m - n), (high - middle) / (k - m)
        pair = (steeper - slope) / (k - n)
        # Noise must not become a term that grows with the square.
        if pair < _LEAST_PAIR or pair * k * k < _CURVED * high:
            each = (high - low) / (k - n)
            return cls(low - each * n, each, 0.0)
        each = slope - pair * (n + m)
        return cls(low - each * n - pair * n * n, each, pair)

    def __call__(self, nodes: int) -> float:
        return self.fixed + self.each * nodes + self.pair * nodes * nodes


#: Part of a figure that a square must make up, at the largest measured size, to be believed.
_CURVED = 0.8
#: What one of a pair must cost the other: what counting itself costs is not known to the byte.
_LEAST_PAIR = 10.0


def main() -> None:
    """Print a table for each broker and kind of worker, and what is broadcast on Redis."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--broker", choices=cluster_brokers.BROKERS, action="append")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--workers", type=int, nargs=3, default=(1, 2, 4))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--option", action="append", default=[], help="another option of gw worker")
    options = parser.parse_args()
    for name in options.broker or cluster_brokers.BROKERS:
        for kind in options.kind or KINDS:
            with cluster_brokers.BROKERS[name]() as broker:
                started = (*KINDS[kind], *options.option)
                measured = list(_measure(broker, started, options))
            _print(f"{name}, {kind}", measured, options.nodes)


def _measure(
    broker: cluster_brokers.Broker, started: Sequence[str], options: argparse.Namespace
) -> Iterator[Idle]:
    with ExitStack() as stack:
        running = 0
        for count in sorted(options.workers):
            for number in range(running, count):
                stack.enter_context(_worker(broker, number, started))
            running = count
            time.sleep(SETTLING)
            yield _idle(broker, count, options.seconds)
        if isinstance(broker, cluster_brokers.Redis):
            _print_published(broker.published(options.seconds), running, options.seconds)


@contextmanager
def _worker(
    broker: cluster_brokers.Broker, number: int, started: Sequence[str]
) -> Iterator[Process]:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.cluster_app:celery"]
    command += ["gw", "worker", "--gpu", "CPU", "-n", f"gpu@node{number:04}", "-l", "INFO"]
    env = {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": broker.results}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "worker.log"
        process = Process([*command, *started], log, env=env, cwd=Path(os.curdir).resolve())
        try:
            # Told by its log: a question to it would be counted.
            eventually(lambda: process.exit_code is not None or "is ready\n" in log.read_text(), 60)
            if process.exit_code is not None:
                raise SystemExit(f"a worker ended: {log.read_text()[-2000:]}")
            yield process
        finally:
            process.stop()


def _idle(broker: cluster_brokers.Broker, workers: int, seconds: float) -> Idle:
    first, before, began = broker.totals(), broker.totals(), time.monotonic()
    time.sleep(seconds)
    after, took = broker.totals(), time.monotonic() - began
    grown = {name: after.commands[name] - before.commands[name] for name in after.commands}

    def rate(name: str) -> float:
        """What grew, less what asking for it costs."""
        asking = getattr(before, name) - getattr(first, name)
        return max(0.0, getattr(after, name) - getattr(before, name) - asking) / took

    return Idle(
        workers=workers,
        connections=after.connections,
        channels=after.channels,
        queues=after.queues,
        commands={name: count / took for name, count in grown.items() if count},
        received_bytes=rate("received_bytes"),
        sent_bytes=rate("sent_bytes"),
    )


def _print(title: str, measured: Sequence[Idle], nodes: int) -> None:
    sizes = ", ".join(str(one.workers) for one in measured)
    print(f"\n{title}: {sizes} and {nodes:,} workers together")
    for name in ("connections", "channels", "queues", *_RATES):
        points = [(one.workers, float(getattr(one, name))) for one in measured]
        fit = Fit.of(points)
        square = f" + {fit.pair:,.1f} n^2" if fit.pair else ""
        print(
            f"  {_RATES.get(name, name):24}"
            + "".join(f"{value:10,.1f}" for _, value in points)
            + f"{fit(nodes):16,.0f}   {fit.fixed:,.1f} + {fit.each:,.1f} n{square}"
        )
    last = measured[-1]
    listed = sorted(last.commands.items(), key=lambda one: -one[1])
    each = ", ".join(f"{name} {rate / last.workers:.2f}" for name, rate in listed[:12])
    print(f"  each worker, a second: {each}")


_RATES = {
    "commands_a_second": "commands a second",
    "received_bytes": "bytes/s to the broker",
    "sent_bytes": "bytes/s from the broker",
}


def _print_published(published: dict[str, list[int]], workers: int, seconds: float) -> None:
    for channel, sizes in sorted(published.items()):
        rate = len(sizes) / seconds / workers
        print(
            f"  broadcast {channel}: {rate:.2f}/s for each worker, "
            f"{statistics.mean(sizes):,.0f} bytes"
        )


if __name__ == "__main__":
    main()
