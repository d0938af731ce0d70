"""The inputs of a trace, from a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gw_celery import errors

TOKENS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
PLAIN = ("seconds", "workload")


@dataclasses.dataclass(frozen=True)
class Trace:
    """When each input arrived, counted from the first, and its workload."""

    times: Sequence[float]
    workloads: Sequence[float]

    @property
    def seconds(self) -> float:
        """From the first to the last arrival."""
        return self.times[-1]

    def __len__(self) -> int:
        return len(self.times)


def read(path: Path, generated_factor: float = 10.0) -> Trace:
    """Read a CSV file with the columns of `TOKENS` or of `PLAIN`, in any order of its lines.

    Raises:
        TraceError: with the line, what is wrong with it, and the remedy.
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
    parse = _parser(path, header, generated_factor)
    for number, line in enumerate(lines, start=2):
        if not any(cell.strip() for cell in line):
            continue
        try:
            at, workload = parse(line)
        except (ValueError, IndexError, TypeError) as error:
            raise errors.TraceError(
                f"{path}, line {number}: {','.join(line)!r}: {error}; each line needs "
                f"{','.join(header)}"
            ) from error
        if not (math.isfinite(at) and math.isfinite(workload) and workload >= 0):
            raise errors.TraceError(
                f"{path}, line {number}: {','.join(line)!r}: a time and a workload are finite "
                f"numbers, and the workload is 0 or more; correct the line or leave it out"
            )
        yield at, workload


def _parser(
    path: Path, header: list[str], generated_factor: float
) -> Callable[[list[str]], tuple[float, float]]:
    if set(TOKENS) <= set(header):
        at, context, generated = (header.index(name) for name in TOKENS)
        return lambda line: (
            _stamp(line[at]),
            float(line[context]) + generated_factor * float(line[generated]),
        )
    if set(PLAIN) <= set(header):
        second, work = (header.index(name) for name in PLAIN)
        return lambda line: (float(line[second]), float(line[work]))
    raise errors.TraceError(
        f"{path}, line 1: the columns are {','.join(header)!r}; they have to be "
        f"{','.join(TOKENS)} or {','.join(PLAIN)}"
    )


def _stamp(text: str) -> float:
    """Seconds of a time that may say its zone: only differences are looked at."""
    when = dt.datetime.fromisoformat(text.strip())
    if when.tzinfo is None:
        when = when.replace(tzinfo=dt.UTC)
    return when.timestamp()
