"""Reads the inputs of a trace from a CSV file, for the simulator."""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from gw_celery import errors

TOKENS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
PLAIN = ("seconds", "workload")


@dataclasses.dataclass(frozen=True)
class Trace:
    """The arrival time of each input, from the first one, and its workload."""

    times: Sequence[float]
    workloads: Sequence[float]

    @property
    def seconds(self) -> float:
        return self.times[-1]

    def __len__(self) -> int:
        return len(self.times)


def read(path: Path, generated_factor: float = 10.0) -> Trace:
    """Read a CSV file with the columns of `TOKENS` or of `PLAIN`; its lines may be unsorted.

    Args:
        path: the file.
        generated_factor: workload of a generated token, relative to a context token.

    Raises:
        TraceError: with the line, what is wrong, and the remedy.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = sorted(_inputs(path, csv.reader(file), generated_factor))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise errors.TraceError(f"{path}: {error}; give a CSV file that can be read") from error
    if not found:
        raise errors.TraceError(f"{path}: no line with an input; it needs one at least")
    first = found[0][0]
    return Trace([at - first for at, _ in found], [workload for _, workload in found])


def _inputs(
    path: Path, lines: Iterator[list[str]], generated_factor: float
) -> Iterator[tuple[float, float]]:
    header = [name.strip() for name in next(lines, [])]
    columns = next((names for names in (TOKENS, PLAIN) if set(names) <= set(header)), None)
    if columns is None:
        raise errors.TraceError(
            f"{path}, line 1: the columns are {','.join(header)!r}; they have to be "
            f"{','.join(TOKENS)} or {','.join(PLAIN)}"
        )
    first, *amounts = (header.index(name) for name in columns)
    when = float if columns is PLAIN else _stamp
    for number, line in enumerate(lines, start=2):
        if not any(cell.strip() for cell in line):
            continue
        try:
            at = when(line[first])
            workload, *generated = (float(line[amount]) for amount in amounts)
        except (ValueError, IndexError) as error:
            raise errors.TraceError(
                f"{path}, line {number}: {','.join(line)!r}: {error}; each line needs "
                f"{','.join(header)}"
            ) from error
        workload += generated_factor * sum(generated)
        if not (math.isfinite(at) and math.isfinite(workload) and workload >= 0):
            raise errors.TraceError(
                f"{path}, line {number}: {','.join(line)!r}: a time and a workload are finite "
                f"numbers, and the workload is 0 or more; correct the line or leave it out"
            )
        yield at, workload


def _stamp(text: str) -> float:
    """Return the seconds of a time with or without a zone; only differences are used."""
    when = dt.datetime.fromisoformat(text.strip())
    if when.tzinfo is None:
        when = when.replace(tzinfo=dt.UTC)
    return when.timestamp()
