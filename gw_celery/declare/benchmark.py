"""The declared benchmark of a task: its inputs, and how often they are run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gw_celery import errors
from gw_celery.declare import check

Sample = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The source of benchmark inputs, and how often they are run.

    ``dataset`` is a sequence of keyword arguments, ``generator`` a function that returns one such
    mapping; one of the two is set. ``runs`` rounds of ``concurrency`` parallel inputs are timed.
    """

    dataset: tuple[Sample, ...] = ()
    generator: Callable[[], Sample] | None = None
    runs: int = 10
    concurrency: int = 10


def declare(
    dataset: Sequence[Sample] | None,
    generator: Callable[[], Sample] | None,
    runs: int,
    concurrency: int,
) -> Benchmark | None:
    """Return the benchmark that the arguments describe, ``None`` when they name no source.

    Raises:
        DeclarationError: for two sources, an empty dataset, or counts out of range.
    """
    check.integer("benchmark_runs", runs, 1, 10_000)
    check.integer("benchmark_concurrency", concurrency, 1, 10_000)
    check.function("benchmark_generator", generator)
    if dataset is not None and generator is not None:
        raise errors.DeclarationError(
            "benchmark_generator", generator, "give benchmark_dataset or this, not both"
        )
    if dataset is None and generator is None:
        return None
    return Benchmark(
        dataset=_samples(dataset), generator=generator, runs=runs, concurrency=concurrency
    )


def require_matching(benchmark: Benchmark | None, signature: inspect.Signature) -> None:
    """Check that each sample of a dataset is a complete call of ``signature``."""
    for position, sample in enumerate(benchmark.dataset if benchmark else ()):
        try:
            signature.bind(**sample)
        except TypeError as exc:
            raise errors.DeclarationError(
                f"benchmark_dataset[{position}]",
                dict(sample),
                f"its keys must match the parameters {signature}: {exc}",
            ) from exc


def _samples(dataset: object) -> tuple[Sample, ...]:
    if dataset is None:
        return ()
    if not isinstance(dataset, Sequence) or isinstance(dataset, str | bytes):
        raise errors.DeclarationError("benchmark_dataset", dataset, "must be a list of dicts")
    if not dataset:
        raise errors.DeclarationError("benchmark_dataset", dataset, "must not be empty")
    for sample in dataset:
        if not isinstance(sample, Mapping) or not all(isinstance(key, str) for key in sample):
            raise errors.DeclarationError(
                "benchmark_dataset", sample, "each sample must be a dict of parameter names"
            )
    return tuple(dict(sample) for sample in dataset)
