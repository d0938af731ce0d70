"""The outcome of a replayed trace, as figures and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gw_celery.simulate import cluster

Figures = dict[str, float | int]
#: The figures that a table shows, by the heads of their columns, and how.
COLUMNS = {
    "over target": ("over_target_share", "{:.2%}"),
    "replica-seconds": ("replica_seconds", "{:,.0f}"),
    "starts": ("starts", "{:,}"),
    "mean wait": ("mean_wait", "{:.2f} s"),
    "p50": ("p50_wait", "{:.2f} s"),
    "p99": ("p99_wait", "{:.1f} s"),
    "max": ("max_wait", "{:.1f} s"),
}


def figures(outcome: cluster.Outcome, target_queue_time: float) -> Figures:
    """Return the figures of one policy; an input that was refused counts as over target."""
    waits = sorted(wait for wait in outcome.waits if wait is not None)
    refused = len(outcome.waits) - len(waits)
    late = sum(wait > target_queue_time for wait in waits) + refused
    return {
        "over_target_share": late / len(outcome.waits),
        "replica_seconds": outcome.replica_seconds,
        "mean_wait": sum(waits) / len(waits) if waits else 0.0,
        "p50_wait": _percentile(waits, 0.5),
        "p99_wait": _percentile(waits, 0.99),
        "max_wait": waits[-1] if waits else 0.0,
        "starts": outcome.starts,
        "served": len(waits),
        "refused": refused,
    }


def table(rows: Mapping[str, Figures], columns: Mapping[str, tuple[str, str]] = COLUMNS) -> str:
    """Return a line for each policy, with its name, under the heads of ``columns``."""
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) for key, form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
