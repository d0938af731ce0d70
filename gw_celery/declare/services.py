"""Declared services: remote functions, and classes with their methods; in every process."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from gw_celery import errors
from gw_celery.declare import check, gpu, markers, parameters, probes
from gw_celery.types import AnyFunction

#: The key of the inputs that belong to no service: plain Celery tasks.
PLAIN = ""
_LABELS = {
    markers.METHOD: "gw.method",
    markers.ENTER: "gw.on_enter",
    markers.EXIT: "gw.on_exit",
    markers.BATCHED: "gw.batched",
    markers.CONCURRENT: "gw.concurrent",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One callable of a service, which is one Celery task."""

    name: str
    task_name: str
    function: AnyFunction
    #: The signature that callers see: without ``self``.
    signature: inspect.Signature
    is_async: bool
    batched: markers.Batched | None
    benchmark: markers.Benchmark | None
    workload_calculator: AnyFunction | None
    #: Celery task options that the user gave.
    options: dict[str, Any]

    @functools.cached_property
    def is_bound(self) -> bool:
        """Whether the body takes the Celery task as its first argument (``bind=True``)."""
        return bool(self.options.get("bind"))

    @functools.cached_property
    def task_signature(self) -> inspect.Signature:
        """The signature that Celery sees; it begins with the task if the body takes that."""
        return inspect.signature(self.function) if self.is_bound else self.signature


@dataclasses.dataclass
class Placement:
    """The devices, queue, number of replicas and time limits of a service.

    Raises:
        DeclarationError: if an argument breaks its rule.
    """

    gpu: gpu.Gpu | None = None
    queue: str | None = None
    min_workers: int = 0
    max_workers: int | None = None
    timeout: float | None = 300.0
    #: Seconds that an input may wait in the queue; ``None``: the setting ``gw_max_queue_time``.
    max_queue_time: float | None = None

    def __post_init__(self) -> None:
        name: object = self.queue
        # ``celery worker -Q`` splits at commas and strips spaces: it cannot name such a queue.
        is_name = isinstance(name, str) and name and "," not in name and name == name.strip()
        if name is not None and not is_name:
            rule = "must be the name of a queue, without a comma or a space at its ends"
            raise errors.DeclarationError("queue", name, rule)
        check.integer("min_workers", self.min_workers, 0)
        if self.max_workers is not None:
            check.integer("max_workers", self.max_workers, 1)
            if self.max_workers < self.min_workers:
                rule = f"must not be less than min_workers={self.min_workers}"
                raise errors.DeclarationError("max_workers", self.max_workers, rule)
        self.timeout = check.optional("timeout", self.timeout)
        self.max_queue_time = check.optional("max_queue_time", self.max_queue_time)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """The unit that has its own queue, concurrency, batching and score."""

    name: str
    #: The decorated function or class.
    target: Any
    placement: Placement
    concurrent: markers.Concurrent | None
    methods: dict[str, Method]
    probes: tuple[probes.Probe, ...] = ()
    parameters: dict[str, parameters.Parameter] = dataclasses.field(default_factory=dict)
    enter_hooks: tuple[str, ...] = ()
    exit_hooks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        required = [name for name, value in self.parameters.items() if value.is_required]
        for method in self.methods.values():
            batched = method.batched
            needed = batched.max_batch_size * batched.max_running_batches if batched else 0
            if needed > self.max_inputs:
                raise errors.DeclarationError(
                    "max_inputs",
                    self.max_inputs,
                    f"must be at least max_batch_size x max_running_batches = {needed} for "
                    f"{self.name}.{method.name}, or its batches never fill",
                )
            if required and method.benchmark is not None:
                raise errors.DeclarationError(
                    required[0],
                    self.parameters[required[0]],
                    f"needs a default, for the benchmark of {self.name}.{method.name} gives no "
                    f"value",
                )

    @functools.cached_property
    def key(self) -> str:
        """The dotted name of the function or class, which identifies the service."""
        return f"{self.target.__module__}.{self.target.__qualname__}"

    @functools.cached_property
    def family(self) -> str:
        return gpu.ANY if self.placement.gpu is None else self.placement.gpu.family

    @functools.cached_property
    def queue(self) -> str:
        return self.placement.queue or f"{self.family}.{self.name}"

    @functools.cached_property
    def is_class(self) -> bool:
        return inspect.isclass(self.target)

    def pool_features(self) -> list[str]:
        """Return the names of the declared features that only the GPU pool can act on."""
        methods, where = self.methods.values(), self.placement
        declared = {
            "concurrent": self.concurrent is not None,
            "batched": any(method.batched for method in methods),
            "probes": bool(self.probes),
            "benchmark": any(method.benchmark for method in methods),
            "workload_calculator": any(method.workload_calculator for method in methods),
            "min_workers": where.min_workers > 0,
            "max_workers": where.max_workers is not None,
            "max_queue_time": where.max_queue_time is not None,
            "memory_gb": where.gpu is not None and where.gpu.memory_gb is not None,
        }
        return [name for name, is_declared in declared.items() if is_declared]

    @functools.cached_property
    def max_inputs(self) -> int:
        """Maximum inputs in flight in one replica for this service."""
        if self.concurrent is not None:
            return self.concurrent.max_inputs
        sizes = [m.batched.max_batch_size for m in self.methods.values() if m.batched]
        return 2 * max(sizes) if sizes else 1

    @functools.cached_property
    def target_inputs(self) -> int:
        """Inputs in flight per replica that the autoscaler aims at."""
        return self.max_inputs if self.concurrent is None else self.concurrent.target_inputs


def from_function(fn: AnyFunction, where: Placement, mark: markers.TaskMark) -> Service:
    """Return the service that ``@app.remote`` makes of an ``async def``.

    Args:
        fn: the decorated function.
        where: its placement.
        mark: the arguments of its task.

    Raises:
        DeclarationError: unless ``fn`` is an ``async def`` whose parameters match its benchmark.
    """
    if not inspect.isfunction(fn):
        raise errors.DeclarationError("fn", fn, "@app.remote decorates a function")
    _require_one_answer("fn", fn)
    if not inspect.iscoroutinefunction(fn):
        raise errors.DeclarationError(
            "fn", fn.__qualname__, "a remote function is asynchronous: write `async def`"
        )
    is_bound = bool(mark.options.get("bind"))
    if is_bound and hasattr(fn, markers.BATCHED):
        raise errors.DeclarationError(
            "bind", True, "a batched body has many requests: leave it out"
        )
    return Service(
        name=fn.__name__,
        target=fn,
        placement=where,
        concurrent=getattr(fn, markers.CONCURRENT, None),
        methods={fn.__name__: _method(fn, fn.__name__, fn, mark, where, drop_first=is_bound)},
    )


def from_class(cls: type, where: Placement, declared_probes: object) -> Service:
    """Return the service that ``@app.cls`` makes of a class.

    Args:
        cls: the decorated class.
        where: its placement.
        declared_probes: the unchecked argument ``probes``.

    Raises:
        DeclarationError: if the class lacks marked methods, or needs constructor arguments, or a
            probe or benchmark differs from the methods.
    """
    _require_instantiable(cls)
    methods = {
        name: _method(fn, name, cls, getattr(fn, markers.METHOD), where, drop_first=True)
        for name, fn in _functions_of_tasks(cls).items()
    }
    signatures = {name: method.signature for name, method in methods.items()}
    return Service(
        name=cls.__name__,
        target=cls,
        placement=where,
        concurrent=getattr(cls, markers.CONCURRENT, None),
        methods=methods,
        probes=probes.require_methods(declared_probes, signatures),
        parameters=parameters.declared(cls),
        enter_hooks=_hooks(cls, markers.ENTER),
        exit_hooks=_hooks(cls, markers.EXIT)[::-1],
    )


def _method(
    fn: AnyFunction,
    name: str,
    target: Any,
    mark: markers.TaskMark,
    where: Placement,
    *,
    drop_first: bool,
) -> Method:
    check.soft_before_hard(mark.options, where.timeout)
    if mark.options.get("pydantic") and hasattr(fn, markers.BATCHED):
        raise errors.DeclarationError(
            "pydantic", True, "a batched body takes lists: build the models in the body"
        )
    signature = inspect.signature(fn)
    if drop_first:
        if not signature.parameters:
            raise errors.DeclarationError(
                fn.__qualname__, str(signature), "needs a `self` parameter"
            )
        signature = signature.replace(parameters=[*signature.parameters.values()][1:])
    for position, sample in enumerate(mark.benchmark.dataset if mark.benchmark else ()):
        try:
            signature.bind(**sample)
        except TypeError as exc:
            raise errors.DeclarationError(
                f"benchmark_dataset[{position}]",
                dict(sample),
                f"its keys must match the parameters {signature}: {exc}",
            ) from exc
    dotted = f"{target.__module__}.{target.__name__}"
    return Method(
        name=name,
        task_name=mark.options.get("name") or (dotted if target is fn else f"{dotted}.{name}"),
        function=fn,
        signature=signature,
        is_async=inspect.iscoroutinefunction(fn),
        batched=getattr(fn, markers.BATCHED, None),
        benchmark=mark.benchmark,
        workload_calculator=mark.workload_calculator,
        options={key: value for key, value in mark.options.items() if key != "name"},
    )


def _require_one_answer(label: str, fn: AnyFunction) -> None:
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise errors.DeclarationError(
            label,
            fn.__qualname__,
            "yields, and its body would never run: return one value, or a list",
        )


def _require_instantiable(cls: object) -> None:
    """Check that a replica can instantiate a class without arguments."""
    if not inspect.isclass(cls):
        raise errors.DeclarationError("class", cls, "@app.cls decorates a class")
    if markers.SERVICE in vars(cls):
        raise errors.DeclarationError("class", cls.__qualname__, "is decorated twice: keep one")
    if not cls.__dictoffset__:
        raise errors.DeclarationError(
            "class", cls.__qualname__, 'keeps no __dict__; add "__dict__" to its __slots__'
        )
    if cls.__init__ is object.__init__:
        return
    try:
        inspect.signature(cls.__init__).bind(object())
    except TypeError as exc:
        raise errors.DeclarationError(
            "class",
            cls.__qualname__,
            f"is made without arguments in each replica ({exc}); use gw.parameter() for values "
            f"that callers set, and @gw.on_enter() to load",
        ) from exc


def _functions_of_tasks(cls: type) -> dict[str, AnyFunction]:
    """Return the methods with ``@gw.method`` by name; refuse marks that have no effect."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name, None)
        if isinstance(member, staticmethod | classmethod | property):
            function = member.fget if isinstance(member, property) else member.__func__
            for label in (label for mark, label in _LABELS.items() if hasattr(function, mark)):
                wrapper = type(member).__name__
                raise errors.DeclarationError(
                    label, name, f"marks a method that takes `self`: take @{wrapper} away"
                )
    tasks = _marked(cls, markers.METHOD)
    if not tasks:
        raise errors.DeclarationError(
            "class", cls.__qualname__, "has no method marked with @gw.method()"
        )
    for name in _marked(cls, markers.CONCURRENT):
        raise errors.DeclarationError("gw.concurrent", name, "marks the class, not a method of it")
    for name in _marked(cls, markers.BATCHED):
        if name not in tasks:
            raise errors.DeclarationError("gw.batched", name, "marks a task: add @gw.method()")
    for name, fn in tasks.items():
        if hasattr(fn, markers.ENTER) or hasattr(fn, markers.EXIT):
            rule = "is a hook too, which only the worker calls: take one mark away"
            raise errors.DeclarationError("gw.method", name, rule)
        if getattr(fn, markers.METHOD).options.get("bind"):
            raise errors.DeclarationError(
                "bind", True, "`self` of a method is its instance: use celery.current_task"
            )
        _require_one_answer("gw.method", fn)
    return tasks


def _hooks(cls: type, mark: str) -> tuple[str, ...]:
    """Return the names of the methods with ``mark``, in definition order, base classes first."""
    functions = _marked(cls, mark)
    for name, fn in functions.items():
        _require_one_answer(_LABELS[mark], fn)
        try:
            inspect.signature(fn).bind(object())
        except TypeError as exc:
            raise errors.DeclarationError(
                _LABELS[mark], name, f"the worker calls a hook with `self` alone: {exc}"
            ) from exc
    return tuple(functions)


def _marked(cls: type, mark: str) -> dict[str, AnyFunction]:
    """Return the marked members in definition order; an override takes the overridden place."""
    names: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            if hasattr(_plain(member), mark):
                names.setdefault(name)
    members = {name: _plain(inspect.getattr_static(cls, name)) for name in names}
    return {name: fn for name, fn in members.items() if hasattr(fn, mark)}


def _plain(member: Any) -> Any:
    """Return the user's function if ``@app.cls`` has replaced it, else ``member`` itself."""
    return getattr(member, markers.FUNCTION, member)
