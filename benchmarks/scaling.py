"""The autoscaler's policy on many traces, and how much its constants matter; others beside it.

    python -m benchmarks.scaling [--trace FILE.csv] [--startups 10,60] [--vary] [--others]
    python -m benchmarks.scaling compare TRACE.csv [options of the simulator] [--plot OUT.png]

Prints, for each trace and start-up time, the share of inputs over target, the replica-seconds as a
multiple of the best fixed pool's, and the starts. --trace adds a trace of your own in eleven
versions; --vary does it again with each constant of the policy a fifth lower and higher, and prints
means; --others adds the compared policies.

``compare`` has the options of ``python -m gw_celery.simulate``, and prints its figures
for our policy and the others on one trace, beside the best fixed pool in hindsight.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import scaling_hindsight, scaling_plot, scaling_rivals, scaling_traces
from gw_celery import errors
from gw_celery.policy import scaling
from gw_celery.simulate import __main__ as command
from gw_celery.simulate import cluster, runs, trace

SCORE, MOST = 2_000.0, 400
#: The simulator's columns, with the cost beside that of the best fixed pool.
COLUMNS = {**runs.COLUMNS, "of best fixed": ("of_best_fixed", "{:.2f}x")}
Row = tuple[float, float, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Varied(scaling.Rules):
    """The rules with what is fixed in them multiplied."""

    late: float = 1.0
    span: float = 1.0
    hold: float = 1.0

    @property
    def lateness(self) -> float:
        return self.late * super().lateness

    @property
    def rate_span(self) -> float:
        plain = scaling.Rules(start_up=self.start_up, target_queue_time=self.target_queue_time)
        return self.span * plain.rate_span

    @property
    def residence(self) -> float:
        return self.hold * super().residence


VARIATIONS: dict[str, dict[str, float]] = {
    "as it is": {},
    "window x0.8": {"window": 480.0},
    "window x1.2": {"window": 720.0},
    "target_util 0.85": {"target_util": 0.85},
    "target_util 0.95": {"target_util": 0.95},
    "burst head-room x0.8": {"late": 0.8},
    "burst head-room x1.2": {"late": 1.2},
    "rate's span x0.8": {"span": 0.8},
    "rate's span x1.2": {"span": 1.2},
    "residence x0.8": {"hold": 0.8},
    "residence x1.2": {"hold": 1.2},
}


def main(argv: list[str] | None = None) -> int:
    """Print a table of the policy, of its variations, or beside others."""
    options = _options(argv)
    if options.command == "compare":
        return _compare(options)
    traces = scaling_traces.synthetic()
    if options.trace is not None:
        traces |= scaling_traces.versions("given", trace.read(options.trace))
    with concurrent.futures.ProcessPoolExecutor(options.processes) as pool:
        fixed = dict(zip(traces, pool.map(best, traces.values()), strict=True))
        for start_up in options.startups:
            print(f"\nstart-up {start_up:g} s: over target, of best fixed, starts")
            for name, given in (VARIATIONS if options.vary else {"as it is": {}}).items():
                rules = [Varied(start_up=start_up, **given)] * len(traces)
                found = list(pool.map(ours, traces.values(), fixed.values(), rules))
                if options.vary:
                    _print_means(name, list(traces), found)
                else:
                    _print_all(traces, fixed, found, start_up, options.others)
    return 0


def compare(replayed: trace.Trace, scenario: cluster.Scenario) -> dict[str, Any]:
    """Return the figures of our policy, those of the others under ``policies``, and hindsight's."""
    target = scenario.rules.target_queue_time
    ours = runs.figures(runs.play(replayed, scenario), target)
    fixed = scaling_hindsight.best(replayed, scenario.score, target, scenario.queue_limit)
    others = {
        name: runs.figures(runs.play(replayed, scenario, [scaler]), target)
        for name, scaler in scaling_rivals.all_of(scenario.least, scenario.most).items()
    }
    for figures in (ours, *others.values()):
        figures["of_best_fixed"] = figures["replica_seconds"] / fixed.replica_seconds
    return {
        **ours,
        "best_fixed_replicas": fixed.replicas,
        "best_fixed_replica_seconds": fixed.replica_seconds,
        "policies": others,
    }


def _compare(options: argparse.Namespace) -> int:
    try:
        scenario = command.to_scenario(options)
        if options.plot is not None:
            scaling_plot.require(options.plot)
        replayed = trace.read(options.trace, options.generated_factor)
        compared = compare(replayed, scenario)
        if options.plot is not None:
            _, moments = scaling_plot.record(replayed, scenario)
            scaling_plot.draw(moments, options.plot, options.trace.name)
    except (errors.GWCeleryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(compared, indent=2) if options.json else text(compared))
    return 0


def text(compared: dict[str, Any]) -> str:
    """Return a table of our policy and the others, under a line on the best fixed pool."""
    replicas = compared["best_fixed_replicas"]
    table = runs.table({"gw_celery": compared, **compared["policies"]}, COLUMNS)
    return (
        f"{compared['served'] + compared['refused']:,} inputs; the best fixed pool in hindsight "
        f"has {replicas} {'replica' if replicas == 1 else 'replicas'}: "
        f"{compared['best_fixed_replica_seconds']:,.0f} replica-seconds\n\n{table}"
    )


def best(one: trace.Trace) -> scaling_hindsight.Fixed:
    return scaling_hindsight.best(one, SCORE, scaling.Rules().target_queue_time)


def ours(one: trace.Trace, fixed: scaling_hindsight.Fixed, rules: Varied) -> Row:
    """The mean of three seeds, and the most starts."""
    rows = [_row(runs.play(one, _scenario(rules, seed)), fixed, rules) for seed in range(3)]
    shares, costs, starts = zip(*rows, strict=True)
    return statistics.mean(shares), statistics.mean(costs), max(starts)


def _scenario(rules: scaling.Rules, seed: int = 0) -> cluster.Scenario:
    return cluster.Scenario(score=SCORE, rules=rules, most=MOST, seed=seed)


def _row(outcome: cluster.Outcome, fixed: scaling_hindsight.Fixed, rules: scaling.Rules) -> Row:
    figures = runs.figures(outcome, rules.target_queue_time)
    cost = figures["replica_seconds"] / fixed.replica_seconds
    return figures["over_target_share"], cost, int(figures["starts"])


def _print_all(
    traces: dict[str, trace.Trace],
    fixed: dict[str, scaling_hindsight.Fixed],
    found: list[Row],
    start_up: float,
    is_with_others: bool,
) -> None:
    for (name, one), row in zip(traces.items(), found, strict=True):
        cells = [_cell(row)]
        if is_with_others:
            rules = scaling.Rules(start_up=start_up)
            for scaler in scaling_rivals.all_of(1, MOST).values():
                outcome = runs.play(one, _scenario(rules), [scaler])
                cells.append(_cell(_row(outcome, fixed[name], rules)))
        print(f"{name:24} {fixed[name].replicas:4}  " + "   ".join(cells), flush=True)


def _print_means(name: str, names: list[str], found: list[Row]) -> None:
    groups = {"all": found}
    if given := [row for one, row in zip(names, found, strict=True) if one.startswith("given")]:
        groups |= {"given": given[:1], "its versions": given}
    cells = []
    for group, rows in groups.items():
        shares, costs, starts = (statistics.mean(column) for column in zip(*rows, strict=True))
        cells.append(f"{group} {_cell((shares, costs, round(starts)))}")
    print(f"{name:22} " + "   ".join(cells), flush=True)


def _cell(row: Row) -> str:
    return f"{row[0]:6.2%} {row[1]:5.2f}x {row[2]:5}"


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, help="CSV file, as the simulator reads it")
    parser.add_argument(
        "--startups",
        type=lambda text: [float(one) for one in text.split(",")],
        default=[10.0, 60.0],
    )
    parser.add_argument("--vary", action="store_true", help="with each constant lower and higher")
    parser.add_argument("--others", action="store_true", help="the compared policies, too")
    parser.add_argument("--processes", type=int, default=2)
    commands = parser.add_subparsers(dest="command")
    one_trace = commands.add_parser("compare", help="one trace, beside other policies")
    command.add_options(one_trace)
    one_trace.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw arrivals, backlog and replicas"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
