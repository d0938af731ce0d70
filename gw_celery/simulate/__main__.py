"""Replay a trace of arrivals through the autoscaler's policy."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from gw_celery import errors
from gw_celery.policy import scaling
from gw_celery.simulate import cluster, runs, trace

#: Maximum number of replicas, and of nodes.
_MOST = 100_000


def _number(
    rule: str, is_right: Callable[[float], bool], kind: Callable[[float], float] = float
) -> Callable[[str], float]:
    """Return a function that reads an option; ``rule`` describes the allowed values."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_right(value)):
            raise argparse.ArgumentTypeError(f"{text!r}: give {rule}")
        return kind(value)

    return read


_ABOVE_ZERO = _number("a number above 0", lambda n: n > 0)
_DURATION = _number("a number of 0 or more", lambda n: n >= 0)
_SHARE = _number("a number above 0 and at most 1", lambda n: 0 < n <= 1)
_COUNT = _number("a whole number of 0 or more", lambda n: n >= 0 and n == int(n), int)
_FROM_ONE = _number(
    f"a whole number from 1 to {_MOST:,}", lambda n: 1 <= n <= _MOST and n == int(n), int
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; exit code 2 means an unusable option or file."""
    command = argparse.ArgumentParser(prog="python -m gw_celery.simulate", description=__doc__)
    add_options(command)
    options = command.parse_args(argv)
    try:
        scenario = to_scenario(options)
        outcome = runs.play(trace.read(options.trace, options.generated_factor), scenario)
    except (errors.GWCeleryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = runs.figures(outcome, scenario.rules.target_queue_time)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"{len(outcome.waits):,} inputs\n\n{runs.table({'gw_celery': figures})}")
    return 0


def to_scenario(options: argparse.Namespace) -> cluster.Scenario:
    """Return the scenario that the options of ``add_options`` describe.

    Raises:
        ConfigurationError: if the bounds contradict each other.
    """
    if options.min > options.max:
        raise errors.ConfigurationError(
            f"--min {options.min} is more than --max {options.max}: raise --max or lower --min"
        )
    return cluster.Scenario(
        score=options.score,
        least=options.min,
        most=options.max,
        nodes=options.nodes,
        queue_limit=options.queue_limit,
        seed=options.seed,
        rules=scaling.Rules(
            target_util=options.target_util,
            target_queue_time=options.target_queue_time,
            inactivity_timeout=options.inactivity_timeout,
            start_up=options.startup,
            window=options.window,
        ),
    )


def add_options(command: argparse.ArgumentParser) -> None:
    columns = f"{','.join(trace.TOKENS)} or {','.join(trace.PLAIN)}"
    command.add_argument("trace", type=Path, help=f"CSV file with the columns {columns}")
    add, rules = command.add_argument, scaling.Rules()
    add("--score", type=_ABOVE_ZERO, default=1.0, help="workload per second of a replica (1)")
    add("--startup", type=_DURATION, default=rules.start_up, help="seconds until READY (30)")
    add("--min", type=_COUNT, default=1, help="fewest replicas, of all nodes (1)")
    add("--max", type=_FROM_ONE, default=60, help="most replicas, of all nodes (60)")
    add("--target-queue-time", type=_ABOVE_ZERO, default=rules.target_queue_time, help="(10)")
    add("--target-util", type=_SHARE, default=rules.target_util, help="(0.9)")
    add("--inactivity-timeout", type=_DURATION, help="with --min 0: seconds until none is left")
    add(
        "--window", type=_ABOVE_ZERO, default=rules.window, help="seconds bursts are kept for (600)"
    )
    add("--queue-limit", type=_COUNT, help="inputs that may wait; more are turned away")
    add("--nodes", type=_FROM_ONE, default=1, help="workers that share --max by apportionment (1)")
    add("--seed", type=int, default=0, help="when in a second each node decides (0)")
    add("--generated-factor", type=_DURATION, default=10.0, help="a generated token's worth (10)")
    add("--json", action="store_true", help="print figures as JSON")


if __name__ == "__main__":
    sys.exit(main())
