"""What batching costs a call that comes alone: one call at a time, three ways, in turn.

python -m benchmarks.lone [--calls 300] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks import lone_app
from gw_celery import testing

WAYS = {
    "no batches": lone_app.Model().single,
    "wait_ms=0": lone_app.Model().batched,
    "wait_ms=10": lone_app.Model().waiting,
}


def main() -> None:
    """Print the median over rounds of the p50, and what it is over the single call's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with testing.worker("benchmarks.lone_app:celery", "-Q", "cpu", "-c", "193"):
        for call in WAYS.values():
            _median(call, 20)
        rounds = [
            {way: _median(call, options.calls) for way, call in WAYS.items()}
            for _ in range(options.rounds)
        ]
    for way in WAYS:
        taken = [1e3 * one[way] for one in rounds]
        over = [1e3 * (one[way] - one["no batches"]) for one in rounds]
        print(
            f"{way}: p50 {statistics.median(taken):.2f} ms "
            f"({min(taken):.2f}-{max(taken):.2f}), over a call without batches "
            f"{statistics.median(over):+.2f} ms ({min(over):+.2f} to {max(over):+.2f})"
        )


def _median(call: Any, calls: int) -> float:
    """Median seconds of one call at a time, from ``delay`` to its answer."""
    times = []
    for number in range(calls):
        started = time.perf_counter()
        call.delay(number).get(timeout=30)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
