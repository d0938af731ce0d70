"""What a replayed trace came to, as figures and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gw_celery.simulate import cluster, hindsight

Figures = dict[str, float | int]
COLUMNS = {
    "over target": ("over_target_share", "{:.2%}"),
    "replica-seconds": ("replica_seconds", "{:,.0f}"),
    "of best fixed": ("of_best_fixed", "{:.2f}x"),
    "starts": ("starts", "{:,}"),
    "mean wait": ("mean_wait", "{:.2f} s"),
    "p50": ("p50_wait", "{:.2f} s"),
    "p99": ("p99_wait", "{:.1f} s"),
    "max": ("max_wait", "{:.1f} s"),
}


def figures(played: cluster.Played, fixed: hindsight.Fixed, target_queue_time: float) -> Figures:
    """The figures of one policy; an input that was turned away counts as over target."""
    waits = sorted(wait for wait in played.waits if wait is not None)
    refused = len(played.waits) - len(waits)
    late = sum(wait > target_queue_time for wait in waits) + refused
    return {
        "over_target_share": late / len(played.waits),
        "replica_seconds": played.replica_seconds,
        "best_fixed_replicas": fixed.replicas,
        "best_fixed_replica_seconds": fixed.replica_seconds,
        "mean_wait": sum(waits) / len(waits) if waits else 0.0,
        "p50_wait": _percentile(waits, 0.5),
        "p99_wait": _percentile(waits, 0.99),
        "max_wait": waits[-1] if waits else 0.0,
        "starts": played.starts,
        "served": len(waits),
        "refused": refused,
    }


def text(found: Mapping[str, Any]) -> str:
    """A table: our policy and the others, beside the best fixed pool in hindsight."""
    rows = {"gw_celery": found, **found["policies"]}
    lines = [["", *COLUMNS], *([name, *_cells(row)] for name, row in rows.items())]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    table = (
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    fixed = found["best_fixed_replicas"]
    return (
        f"{found['served'] + found['refused']:,} inputs; the best fixed pool in hindsight has "
        f"{fixed} {'replica' if fixed == 1 else 'replicas'}: "
        f"{found['best_fixed_replica_seconds']:,.0f} replica-seconds\n\n" + "\n".join(table)
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    shown = dict(row)
    shown["of_best_fixed"] = row["replica_seconds"] / row["best_fixed_replica_seconds"]
    return [form.format(shown[key]) for key, form in COLUMNS.values()]


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
