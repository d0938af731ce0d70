"""What was measured, as text, as a page of the docs, and as files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import figures, plot, systems, workloads

RATIOS = "The GPU pool over each other system: rate/worker CPU an answer/PSS"
RATIO_HEADER = (
    "workload",
    "its p99 over p50",
    *(name for name in systems.SYSTEMS if name != "ours"),
)
#: `document` replaces what lies between these, and keeps the rest of the page.
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclasses.dataclass(kw_only=True)
class Result:
    """All runs of one call of the benchmark."""

    command: str
    machine: str
    #: Of each system.
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Why a system, or a system on a workload ("name, workload"), has no figures.
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def text(result: Result) -> str:
    """For a terminal."""
    parts = [f"{heading}\n{figures.text(rows)}" for heading, rows in _tables(result, figures.cells)]
    if ratios := _ratios(result):
        parts.append(f"{RATIOS}\n{figures.text(ratios, RATIO_HEADER)}")
    return "\n\n".join([*parts, *_failures(result)])


def markdown(result: Result) -> str:
    """Return the tables of a page, after the command, the machine and the versions."""
    by_version: dict[str, list[str]] = {}
    for name, version in result.versions.items():
        by_version.setdefault(version, []).append(name)
    versions = "; ".join(f"{', '.join(names)}: {same}" for same, names in by_version.items())
    parts = [f"`{result.command}` on {result.machine}. {versions}."]
    for heading, rows in _tables(result, figures.page_cells):
        parts += [f"## {heading}", figures.markdown(rows)]
    if ratios := _ratios(result):
        parts += [f"## {RATIOS}", figures.markdown(ratios, RATIO_HEADER)]
    if failures := _failures(result):
        parts += ["## Not measured", "\n".join(f"- {one}" for one in failures)]
    return "\n\n".join(parts)


def svg(result: Result) -> str:
    titles = {name: one.title for name, one in systems.SYSTEMS.items()}
    panels = {workload.title: lines for workload, lines in _lines(result)}
    return plot.svg(panels, titles)


def save(result: Result, folder: Path) -> None:
    """Write results.json, table.md and peers.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(dataclasses.asdict(result), indent=1))
    (folder / "table.md").write_text(markdown(result) + "\n")
    (folder / "peers.svg").write_text(svg(result))


def document(result: Result, docs: Path) -> None:
    """Write the figures of docs/benchmarks.md, and its picture."""
    page = docs / "benchmarks.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{markdown(result)}\n\n{END}{after}")
    (docs / "images" / "peers.svg").write_text(svg(result))


def _lines(result: Result) -> Iterator[tuple[workloads.Workload, list[figures.Line]]]:
    for workload in workloads.WORKLOADS.values():
        if lines := figures.lines(workload, systems.SYSTEMS, result.runs):
            yield workload, lines


def _tables(
    result: Result, cells: Callable[[figures.Line, str], list[str]]
) -> Iterator[tuple[str, list[list[str]]]]:
    for workload, lines in _lines(result):
        best = figures.ideal(workload, result.runs)
        heading = workload.title + (f" (ideal: {best:.0f}/s)" if best else "")
        rows = [cells(one, systems.SYSTEMS[one.system].title) for one in lines]
        yield heading[0].upper() + heading[1:], rows


def _ratios(result: Result) -> list[list[str]]:
    """Return the ratio of ours to each other system, of medians: rate, worker CPU, PSS."""
    rows = []
    for workload, lines in _lines(result):
        by_name = {one.system: one for one in lines}
        if (ours := by_name.pop("ours", None)) is None:
            continue
        others = [by_name.get(name) for name in systems.SYSTEMS if name != "ours"]
        compared = [_ratio(ours, one) if one else "-" for one in others]
        rows.append([workload.name, figures.short(ours.tail, ".2f"), *compared])
    return rows


def _ratio(ours: figures.Line, other: figures.Line) -> str:
    columns = ((one.rate.median, one.worker_cpu.median, one.pss.median) for one in (ours, other))
    return "/".join(f"{mine / its:.2f}" for mine, its in zip(*columns, strict=True))


def _failures(result: Result) -> list[str]:
    return [f"{name}: {reason}" for name, reason in result.failures.items()]
