"""The decorators that mark parts of a class task, or a function, without changing them.

A mark is an attribute of the function or class that carries it; ``@app.cls`` and ``@app.remote``
read it. They stand outermost, so that a mark is there when they look.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

from gw_celery import errors
from gw_celery.declare import check
from gw_celery.types import AnyFunction

F = TypeVar("F", bound=Callable[..., Any])
Sample = Mapping[str, Any]

METHOD = "__gw_method__"
ENTER = "__gw_enter__"
EXIT = "__gw_exit__"
CONCURRENT = "__gw_concurrent__"
BATCHED = "__gw_batched__"
#: Set on a class by ``@app.cls``: a mark that comes later would not be seen.
SERVICE = "__gw_service__"
#: The user's function behind what ``@app.cls`` puts in its place.
FUNCTION = "__gw_function__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concurrent:
    """The inputs of a service that one replica takes at a time, and the autoscaler's aim."""

    max_inputs: int
    target_inputs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batched:
    """How inputs are gathered into one call of a batched function."""

    max_batch_size: int
    wait_ms: int
    key: AnyFunction | None
    size_fn: AnyFunction | None
    max_batch_cost: int | None
    on_error: Literal["isolate", "fail"]
    max_running_batches: int


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskMark:
    """The arguments of ``@gw.method`` or ``@app.remote`` for one callable."""

    benchmark: Benchmark | None
    workload_calculator: AnyFunction | None
    options: dict[str, Any]


@overload
def on_enter(fn: F, /) -> F: ...
@overload
def on_enter() -> Callable[[F], F]: ...
@check.knows_its_keywords("gw.on_enter")
def on_enter(fn: AnyFunction | None = None, /) -> Any:
    """Mark a method that loads: it runs once per replica, before the first input."""
    return _marked(ENTER, True, "gw.on_enter", fn)


@overload
def on_exit(fn: F, /) -> F: ...
@overload
def on_exit() -> Callable[[F], F]: ...
@check.knows_its_keywords("gw.on_exit")
def on_exit(fn: AnyFunction | None = None, /) -> Any:
    """Mark a method that unloads: it runs when the replica stops or drops the instance."""
    return _marked(EXIT, True, "gw.on_exit", fn)


def method(
    fn: AnyFunction | None = None,
    *,
    benchmark_dataset: Any = None,
    benchmark_generator: Any = None,
    benchmark_runs: int = 10,
    benchmark_concurrency: int = 10,
    workload_calculator: AnyFunction | None = None,
    **task_options: Any,
) -> Any:
    """Mark a method as a task: ``Cls().name.delay(...)``, ``await Cls().name(...)``.

    Args:
        benchmark_dataset: sample inputs, a list of dicts of parameter names.
        benchmark_generator: or a function that returns one.
        benchmark_runs: timed rounds.
        benchmark_concurrency: parallel inputs of one round.
        workload_calculator: cost of one input, from its arguments; 1.0 without it.
        task_options: any Celery task option, such as ``autoretry_for`` or ``rate_limit``, and
            attributes of your own.

    Raises:
        DeclarationError: when an argument breaks its rule, is misspelt, or concerns the class.
    """
    mark = TaskMark(
        benchmark=benchmark(
            benchmark_dataset, benchmark_generator, benchmark_runs, benchmark_concurrency
        ),
        workload_calculator=check.function("workload_calculator", workload_calculator),
        options=check.options_of_method(task_options),
    )
    return _marked(METHOD, mark, "gw.method", fn)


def benchmark(
    dataset: object, generator: Callable[[], Sample] | None, runs: int, concurrency: int
) -> Benchmark | None:
    """Return the benchmark that the arguments of a task describe, ``None`` when none is given.

    Raises:
        DeclarationError: for two sources, an empty dataset, or counts out of range.
    """
    check.integer("benchmark_runs", runs, 1, 10_000)
    check.integer("benchmark_concurrency", concurrency, 1, 10_000)
    check.function("benchmark_generator", generator)
    if dataset is None:
        made = Benchmark(generator=generator, runs=runs, concurrency=concurrency)
        return made if generator is not None else None
    if generator is not None:
        raise errors.DeclarationError(
            "benchmark_generator", generator, "give benchmark_dataset or this, not both"
        )
    if not isinstance(dataset, Sequence) or isinstance(dataset, str | bytes):
        raise errors.DeclarationError("benchmark_dataset", dataset, "must be a list of dicts")
    if not dataset:
        raise errors.DeclarationError("benchmark_dataset", dataset, "must not be empty")
    for sample in dataset:
        if not isinstance(sample, Mapping) or not all(isinstance(key, str) for key in sample):
            raise errors.DeclarationError(
                "benchmark_dataset", sample, "each sample must be a dict of parameter names"
            )
    return Benchmark(dataset=tuple(map(dict, dataset)), runs=runs, concurrency=concurrency)


@check.knows_its_keywords("gw.concurrent")
def concurrent(*, max_inputs: int, target_inputs: int | None = None) -> Callable[[F], F]:
    """Let one replica take ``max_inputs`` inputs of the service at a time.

    Args:
        max_inputs: 1 or more, for the class or function below.
        target_inputs: what the autoscaler aims at, 1 to ``max_inputs``; default ``max_inputs``.

    Raises:
        DeclarationError: for a value out of range, or when placed above ``@app.cls``.
    """
    most = check.integer("max_inputs", max_inputs, 1)
    aim = most if target_inputs is None else check.integer("target_inputs", target_inputs, 1, most)
    mark = Concurrent(max_inputs=most, target_inputs=aim)

    def apply(target: F) -> F:
        is_markable = inspect.isclass(target) or inspect.isfunction(target)
        if not is_markable or SERVICE in vars(target):
            raise _misplaced("gw.concurrent", target)
        setattr(target, CONCURRENT, mark)
        return target

    return apply


@check.knows_its_keywords("gw.batched")
def batched(
    *,
    max_batch_size: int,
    wait_ms: int = 0,
    key: AnyFunction | None = None,
    size_fn: AnyFunction | None = None,
    max_batch_cost: int | None = None,
    on_error: Literal["isolate", "fail"] = "isolate",
    max_running_batches: int = 1,
) -> Callable[[F], F]:
    """Gather concurrent inputs into one call: each parameter becomes a list, one entry an input.

    Args:
        max_batch_size: inputs of one call at most, 1 to 1000.
        wait_ms: milliseconds that the oldest input waits for others, 0 to 600000.
        key: ``key(*args, **kwargs)``; inputs of different keys never share a call.
        size_fn: cost of one input, an int, for ``max_batch_cost``.
        max_batch_cost: sum of the costs of one call at most.
        on_error: ``"isolate"`` runs the parts of a failed batch again, ``"fail"`` fails all.
        max_running_batches: calls of this method at the same time in one replica.

    Raises:
        DeclarationError: for a value out of range, or a signature that cannot be batched.
    """
    if on_error not in ("isolate", "fail"):
        raise errors.DeclarationError("on_error", on_error, 'must be "isolate" or "fail"')
    if (size_fn is None) != (max_batch_cost is None):
        raise errors.DeclarationError(
            "max_batch_cost", max_batch_cost, "size_fn and max_batch_cost go together: give both"
        )
    mark = Batched(
        max_batch_size=check.integer("max_batch_size", max_batch_size, 1, 1000),
        wait_ms=check.integer("wait_ms", wait_ms, 0, 600_000),
        key=check.function("key", key),
        size_fn=check.function("size_fn", size_fn),
        max_batch_cost=None
        if max_batch_cost is None
        else check.integer("max_batch_cost", max_batch_cost, 1),
        on_error=on_error,
        max_running_batches=check.integer("max_running_batches", max_running_batches, 1),
    )

    def apply(fn: F) -> F:
        if not inspect.isfunction(fn):
            raise _misplaced("gw.batched", fn)
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise errors.DeclarationError(
                    "gw.batched", str(parameter), "a batched function takes named parameters only"
                )
        setattr(fn, BATCHED, mark)
        return fn

    return apply


def _marked(attribute: str, mark: object, label: str, fn: AnyFunction | None) -> Any:
    def apply(target: Any) -> Any:
        if not inspect.isfunction(target):
            rule = "marks a method of a class"
            if isinstance(target, staticmethod | classmethod):
                wrapper = type(target).__name__
                rule += f": take @{wrapper} away, the worker calls it on an instance"
            raise errors.DeclarationError(label, target, rule)
        setattr(target, attribute, mark)
        return target

    return apply if fn is None else apply(fn)


def _misplaced(label: str, target: object) -> errors.DeclarationError:
    return errors.DeclarationError(
        label, target, "must stand below @app.cls or @app.remote, on the class or function itself"
    )
