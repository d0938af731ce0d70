"""The decorators that mark a function or class, and leave it otherwise unchanged.

A mark is an attribute that ``@app.cls`` and ``@app.remote`` read in any process that imports the
user's modules. The decorator of a mark must therefore stand below these two.
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
#: ``@app.cls`` sets this attribute on a class; a mark that is added afterwards has no effect.
SERVICE = "__gw_service__"
#: Attribute of the object by which ``@app.cls`` replaces a method: the user's function.
FUNCTION = "__gw_function__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concurrent:
    """Inputs of a service that one replica takes at a time, and the autoscaler's target."""

    max_inputs: int
    target_inputs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batched:
    """How a replica gathers inputs into one call of a batched function."""

    max_batch_size: int
    wait_ms: int
    key: AnyFunction | None
    size_fn: AnyFunction | None
    max_batch_cost: int | None
    on_error: Literal["isolate", "fail"]
    max_running_batches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The source of benchmark inputs, and how often they run.

    Either ``dataset`` (a sequence of keyword arguments) or ``generator`` (a function that returns
    one such mapping) is set. ``runs`` rounds of ``concurrency`` parallel inputs are timed.
    """

    dataset: tuple[Sample, ...] = ()
    generator: Callable[[], Sample] | None = None
    runs: int = 10
    concurrency: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskMark:
    """The arguments of ``@gw.method`` or ``@app.remote`` for one task."""

    benchmark: Benchmark | None
    workload_calculator: AnyFunction | None
    options: dict[str, Any]


@overload
def on_enter(fn: F, /) -> F: ...
@overload
def on_enter() -> Callable[[F], F]: ...
@check.knows_its_keywords("gw.on_enter")
def on_enter(fn: AnyFunction | None = None, /) -> Any:
    """Mark a method that loads. It runs once per instance, before the first input.

    Raises:
        DeclarationError: if it does not decorate a plain function.
    """
    return _marked(ENTER, True, "gw.on_enter", fn)


@overload
def on_exit(fn: F, /) -> F: ...
@overload
def on_exit() -> Callable[[F], F]: ...
@check.knows_its_keywords("gw.on_exit")
def on_exit(fn: AnyFunction | None = None, /) -> Any:
    """Mark a method that unloads. It runs when the replica stops or drops the instance.

    Raises:
        DeclarationError: if it does not decorate a plain function.
    """
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
    """Mark a method of a class as a task: ``Cls().name.delay(...)``, ``await Cls().name(...)``.

    Args:
        fn: the method, if the decorator is written without parentheses.
        benchmark_dataset: sample inputs, a list of dicts from parameter name to value.
        benchmark_generator: a function that returns one sample; give this or the dataset.
        benchmark_runs: timed rounds, 1 to 10000.
        benchmark_concurrency: parallel inputs of one round, 1 to 10000.
        workload_calculator: returns the workload of an input from its arguments, in your unit.
            Without it, each input counts as 1.0.
        task_options: any Celery task option, such as ``autoretry_for`` or ``rate_limit``, and
            attributes of your own.

    Returns:
        The method with its mark; without ``fn``, a decorator.

    Raises:
        DeclarationError: if an argument breaks its rule, is misspelt, or belongs on ``@app.cls``.
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
    """Return the benchmark that a task's arguments describe; ``None`` without a source of inputs.

    Raises:
        DeclarationError: if there are two sources, an empty dataset, or a count out of range.
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
    """Let one replica run ``max_inputs`` inputs of a class or function at a time.

    Args:
        max_inputs: inputs in flight per replica and service, 1 or more.
        target_inputs: inputs per replica that the autoscaler aims at, 1 to ``max_inputs``.
            Default: ``max_inputs``.

    Returns:
        A decorator, to be written below ``@app.cls`` or ``@app.remote``.

    Raises:
        DeclarationError: if a value is out of range, or ``@app.cls`` or ``@app.remote`` ran first.
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
    """Gather concurrent inputs into one call: each parameter becomes a list, one entry per input.

    Args:
        max_batch_size: maximum inputs per call, 1 to 1000.
        wait_ms: maximum milliseconds that the oldest input waits for others, 0 to 600000.
        key: called with the arguments of an input; inputs with different keys are never batched
            together.
        size_fn: called with the arguments of an input; returns its cost, an int.
        max_batch_cost: maximum sum of the costs of one call; requires ``size_fn``.
        on_error: ``"isolate"`` runs parts of a failed batch again; ``"fail"`` fails all inputs.
        max_running_batches: calls of this method that one replica runs in parallel, 1 or more.

    Returns:
        A decorator, to be written below ``@gw.method`` or ``@app.remote``.

    Raises:
        DeclarationError: if a value is out of range, or the function has ``*args`` or
            ``**kwargs``.
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
