"""The autoscaler's policy on many traces, and how much its constants matter.

    python -m benchmarks.scaling [--trace FILE.csv] [--startups 10,60] [--vary] [--others]

Prints, for each trace and start-up time, the share of inputs over target, the replica-seconds as a
multiple of the best fixed pool's, and the starts. --trace adds a trace of your own in eleven
versions; --vary does it again with each constant of the policy a fifth lower and higher, and prints
means; --others adds the compared policies.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import statistics
from pathlib import Path

from benchmarks import scaling_traces
from gw_celery.policy import scaling
from gw_celery.simulate import hindsight, policies, report, runs, trace

SCORE, MOST = 2_000.0, 400
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


def main() -> None:
    """Print a table of the policy, or of its variations."""
    options = _options()
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


def best(one: trace.Trace) -> hindsight.Fixed:
    return hindsight.best(one, SCORE, scaling.Rules().target_queue_time)


def ours(one: trace.Trace, fixed: hindsight.Fixed, rules: Varied) -> Row:
    """The mean of three seeds, and the most starts."""
    rows = [
        _row(report.figures(runs.play(one, _question(rules, seed)), fixed, rules.target_queue_time))
        for seed in range(3)
    ]
    shares, costs, starts = zip(*rows, strict=True)
    return statistics.mean(shares), statistics.mean(costs), max(starts)


def _question(rules: scaling.Rules, seed: int = 0) -> runs.Question:
    return runs.Question(score=SCORE, rules=rules, most=MOST, seed=seed)


def _row(figures: report.Figures) -> Row:
    cost = figures["replica_seconds"] / figures["best_fixed_replica_seconds"]
    return figures["over_target_share"], cost, int(figures["starts"])


def _print_all(
    traces: dict[str, trace.Trace],
    fixed: dict[str, hindsight.Fixed],
    found: list[Row],
    start_up: float,
    is_with_others: bool,
) -> None:
    for (name, one), row in zip(traces.items(), found, strict=True):
        cells = [_cell(row)]
        if is_with_others:
            question = _question(scaling.Rules(start_up=start_up))
            for other in (policies.Stock, policies.Keda, policies.Ray):
                scaler = other(1, MOST)
                played = runs.play_with(one, question, [scaler])
                cells.append(_cell(_row(report.figures(played, fixed[name], 10.0))))
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


def _options() -> argparse.Namespace:
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
    return parser.parse_args()


if __name__ == "__main__":
    main()
