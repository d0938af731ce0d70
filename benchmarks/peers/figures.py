"""What many runs say: medians and ranges by system, and tables of them. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.peers import workloads

#: The "system" that is no system: the model alone, in one process.
ALONE = "ideal"


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of some rounds, and their range."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One system on one workload. Times are seconds, memory is bytes."""

    system: str
    rounds: int
    rate: Spread
    p50: Spread
    p99: Spread
    #: Of p99 to p50, within each round.
    tail: Spread
    worker_cpu: Spread
    client_cpu: Spread
    broker_cpu: Spread
    pss: Spread
    #: Of the ideal rate; ``None`` where there is none.
    share: float | None
    #: Whether the latencies are those of a full queue; else they are lower bounds.
    is_settled: bool


def spread(values: Iterable[float]) -> Spread:
    listed = sorted(values)
    return Spread(statistics.median(listed), listed[0], listed[-1])


def ideal(workload: workloads.Workload, runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The rate that nothing can beat: declared, or the best that the model alone did."""
    measured = [one["rate"] for one in _of(runs, workload.name, ALONE)]
    return workload.ideal or max(measured, default=None)


def lines(
    workload: workloads.Workload, names: Iterable[str], runs: Sequence[Mapping[str, Any]]
) -> list[Line]:
    """What each system did on a workload, in the order of ``names``, if it ran."""
    best = ideal(workload, runs)
    found = {name: _of(runs, workload.name, name) for name in names}
    return [_line(name, mine, best) for name, mine in found.items() if mine]


def _of(runs: Sequence[Mapping[str, Any]], workload: str, system: str) -> list[Mapping[str, Any]]:
    return [one for one in runs if (one["workload"], one["system"]) == (workload, system)]


def _line(name: str, mine: Sequence[Mapping[str, Any]], best: float | None) -> Line:
    columns = ("rate", "p50", "p99", "worker_cpu", "client_cpu", "broker_cpu", "pss")
    spreads = {column: spread(one[column] for one in mine) for column in columns}
    return Line(
        system=name,
        rounds=len(mine),
        tail=spread(one["p99"] / one["p50"] for one in mine),
        share=spreads["rate"].median / best if best else None,
        is_settled=all(one["is_settled"] for one in mine),
        **spreads,
    )


HEADER = (
    "system",
    "answers/s",
    "of the ideal",
    "p50 ms",
    "p99 ms",
    "worker CPU us",
    "client CPU us",
    "Redis CPU us",
    "PSS MiB",
)


def cells(line: Line, title: str) -> list[str]:
    """One row of a table, in the columns of ``HEADER``."""
    at_least = "" if line.is_settled else ">= "
    return [
        title,
        short(line.rate),
        "-" if line.share is None else f"{line.share:.0%}",
        at_least + short(line.p50.scaled(1e3)),
        at_least + short(line.p99.scaled(1e3)),
        *(short(one.scaled(1e6)) for one in (line.worker_cpu, line.client_cpu, line.broker_cpu)),
        short(line.pss.scaled(2**-20)),
    ]


#: The columns of docs/benchmarks.md.
PAGE_HEADER = (*HEADER[:6], HEADER[-1])


def page_cells(line: Line, title: str) -> list[str]:
    """Return one row of a table in the columns of ``PAGE_HEADER``; only the rate has its range."""
    at_least = "" if line.is_settled else ">= "
    return [
        *cells(line, title)[:3],
        at_least + _short(line.p50.median * 1e3),
        at_least + _short(line.p99.median * 1e3),
        _short(line.worker_cpu.median * 1e6),
        _short(line.pss.median * 2**-20),
    ]


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str] = PAGE_HEADER) -> str:
    """Return a table for a page: preformatted, because its rows of numbers are read in columns."""
    return f"```text\n{text(rows, header)}\n```"


def text(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """Return a table for a terminal."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    )


def short(one: Spread, form: str = "") -> str:
    """The median, with the range where several rounds differ."""
    median, low, high = (_short(value, form) for value in (one.median, one.low, one.high))
    return median if low == high else f"{median} ({low}-{high})"


def _short(value: float, form: str = "") -> str:
    return format(value, form or (".0f" if value >= 10 else ".1f"))
