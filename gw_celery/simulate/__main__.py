"""Replay a trace of arrivals through the autoscaler's policy, and through three others."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from gw_celery import errors
from gw_celery.policy import scaling
from gw_celery.simulate import plot, report, runs, trace

#: Replicas, and nodes.
_MOST = 100_000


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 is the code of an option or a file that cannot be used."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        replayed = trace.read(options.trace, options.generated_factor)
        found, moments = runs.compare(replayed, _question(options))
        if options.plot is not None:
            plot.draw(moments, options.plot, options.trace.name)
    except (errors.GWCeleryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else report.text(found))
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.min > options.max:
        raise errors.ConfigurationError(
            f"--min {options.min} is more than --max {options.max}: raise --max or lower --min"
        )
    if options.plot is not None:
        plot.require(options.plot)


def _question(options: argparse.Namespace) -> runs.Question:
    return runs.Question(
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gw_celery.simulate", description=__doc__)
    parser.add_argument(
        "trace",
        type=Path,
        help=f"CSV file with the columns {','.join(trace.TOKENS)} or {','.join(trace.PLAIN)}",
    )
    add = parser.add_argument
    rules = scaling.Rules()
    add("--score", type=_above_zero, default=1.0, help="workload per second of a replica (1)")
    add("--startup", type=_duration, default=rules.start_up, help="seconds until READY (30)")
    add("--min", type=_count, default=1, help="fewest replicas, of all nodes (1)")
    add("--max", type=_from_one, default=60, help="most replicas, of all nodes (60)")
    add("--target-queue-time", type=_above_zero, default=rules.target_queue_time, help="(10)")
    add("--target-util", type=_share, default=rules.target_util, help="(0.9)")
    add("--inactivity-timeout", type=_duration, help="with --min 0: seconds until none is left")
    add(
        "--window", type=_above_zero, default=rules.window, help="seconds bursts are kept for (600)"
    )
    add("--queue-limit", type=_count, help="inputs that may wait; more are turned away")
    add("--nodes", type=_from_one, default=1, help="workers that share --max by seats (1)")
    add("--seed", type=int, default=0, help="when in a second each node decides (0)")
    add("--generated-factor", type=_duration, default=10.0, help="a generated token's worth (10)")
    add("--json", action="store_true", help="print figures as JSON")
    add("--plot", type=Path, metavar="OUT.png", help="draw arrivals, backlog and replicas")
    return parser


def _number(text: str, rule: str, is_right: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_right(value)):
        raise argparse.ArgumentTypeError(f"{text!r}: give {rule}")
    return value


def _above_zero(text: str) -> float:
    return _number(text, "a number above 0", lambda value: value > 0)


def _duration(text: str) -> float:
    return _number(text, "a number of 0 or more", lambda value: value >= 0)


def _share(text: str) -> float:
    return _number(text, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def _count(text: str) -> int:
    return int(_number(text, "a whole number of 0 or more", lambda n: n >= 0 and n == int(n)))


def _from_one(text: str) -> int:
    rule = f"a whole number from 1 to {_MOST:,}"
    return int(_number(text, rule, lambda n: 1 <= n <= _MOST and n == int(n)))


if __name__ == "__main__":
    sys.exit(main())
