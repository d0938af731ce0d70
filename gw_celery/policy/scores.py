"""From the rounds of a benchmark to a score: workload per second of one replica."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from gw_celery import errors
from gw_celery.protocol import snapshot, untrusted


class NoScore(errors.GWCeleryError):
    """Raised for a benchmark that says nothing of what a replica can do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Inputs that were started together, from the first start to the last end, in seconds."""

    elapsed: float
    #: Of the inputs that succeeded.
    workload: float
    latencies: tuple[float, ...]
    failures: int = 0
    #: What the first of the failures raised, in words.
    failure: str = ""

    @property
    def throughput(self) -> float:
        return self.workload / self.elapsed if self.elapsed > 0 else 0.0


def of(task: str, rounds: Sequence[Round]) -> snapshot.TaskScore:
    """Return the score of ``task``: the throughput of its median round.

    Whatever an input raises makes it a failure, and failures have no workload: what always raises
    is never quick. Where most rounds have no success, the median would be 0 for a replica that
    does work: it is then all workload by all time.

    Raises:
        NoScore: without a success, or when no input has any workload.
    """
    latencies = sorted(latency for each in rounds for latency in each.latencies)
    failures = sum(round_.failures for round_ in rounds)
    failure = next((round_.failure for round_ in rounds if round_.failure), "")
    if not latencies:
        raise NoScore(f"all of its {failures} inputs failed, the first one with {failure}")
    throughputs = tuple(round_.throughput for round_ in rounds)
    value = statistics.median(throughputs) or _overall(rounds)
    if value <= 0:
        raise NoScore("its inputs have no workload: workload_calculator returned 0 for all of them")
    return snapshot.TaskScore(
        task=task,
        value=value,
        least=min(throughputs),
        most=max(throughputs),
        rounds=throughputs,
        success_rate=len(latencies) / (len(latencies) + failures),
        p50=_percentile(latencies, 0.50),
        p95=_percentile(latencies, 0.95),
        failure=failure,
    )


def combined(values: Iterable[float]) -> float | None:
    """Return the score of a service from those of its tasks: what it does of an even mix.

    That is the harmonic mean: the same workload of each task takes the sum of their times.
    """
    listed = list(values)
    return statistics.harmonic_mean(listed) if listed else None


def figure(given: object) -> float | None:
    """Return a number that is 0 or more; ``None`` for anything else."""
    number = untrusted.finite(given)
    return number if number is not None and number >= 0 else None


def to_json(score: snapshot.TaskScore) -> dict[str, Any]:
    return dataclasses.asdict(score)


def from_json(given: object) -> snapshot.TaskScore:
    """Return the score that ``to_json`` wrote.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(given, dict) or given.keys() != _FIELDS:
        raise ValueError(f"not a score: {given!r:.100}")
    rounds, texts = given["rounds"], {name: given[name] for name in _TEXTS}
    if not isinstance(rounds, list) or not rounds:
        raise ValueError(f"the rounds of a score are {rounds!r:.100}")
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"the texts of a score are {texts!r:.100}")
    read: dict[str, Any] = {name: _number(given[name]) for name in _FIELDS - _TEXTS - {"rounds"}}
    if read["value"] <= 0:
        raise ValueError(f"a score is {read['value']!r}")
    return snapshot.TaskScore(**texts, **read, rounds=tuple(map(_number, rounds)))


def loads(text: str) -> Any:
    """Return what ``text`` says in JSON that has no NaN and no Infinity.

    Raises:
        ValueError: for anything else.
    """
    try:
        return json.loads(text, parse_constant=_refused)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


_FIELDS = {field.name for field in dataclasses.fields(snapshot.TaskScore)}
_TEXTS = {"task", "failure"}


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _number(given: object) -> float:
    number = figure(given)
    if number is None:
        raise ValueError(f"a figure of a score is {given!r:.100}")
    return number


def _overall(rounds: Iterable[Round]) -> float:
    listed = list(rounds)
    elapsed = sum(round_.elapsed for round_ in listed)
    return sum(round_.workload for round_ in listed) / elapsed if elapsed > 0 else 0.0


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``ordered`` do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
