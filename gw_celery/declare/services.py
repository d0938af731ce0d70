"""A service: one remote function, or one class with its methods, as it was declared."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from gw_celery import errors
from gw_celery.declare import benchmark, check, gpu, markers, members, options, parameters, probes
from gw_celery.types import AnyFunction

#: The key of what belongs to no service: plain Celery tasks.
PLAIN = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One callable of a service, which is one Celery task."""

    name: str
    task_name: str
    function: AnyFunction
    #: As callers see it: without ``self``.
    signature: inspect.Signature
    is_async: bool
    batched: markers.Batched | None
    benchmark: benchmark.Benchmark | None
    workload_calculator: AnyFunction | None
    #: Celery task options, as the user gave them.
    options: dict[str, Any]

    @property
    def is_bound(self) -> bool:
        """Whether the body takes the Celery task as its first argument."""
        return bool(self.options.get("bind"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The devices, queue, replicas and time limits of a service."""

    gpu: gpu.Gpu | None = None
    queue: str | None = None
    min_workers: int = 0
    max_workers: int | None = None
    timeout: float | None = 300.0
    max_queue_time: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """What has its own queue, concurrency, batching and score."""

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

    @property
    def key(self) -> str:
        """The dotted name of the function or class: what tells two services apart."""
        return f"{self.target.__module__}.{self.target.__qualname__}"

    @property
    def family(self) -> str:
        return gpu.family_of(self.placement.gpu)

    @property
    def queue(self) -> str:
        return self.placement.queue or f"{self.family}.{self.name}"

    def max_queue_time(self, default: float | None) -> float | None:
        """Seconds that an input may wait in the queue; ``default`` is the project's setting."""
        own = self.placement.max_queue_time
        return default if own is None else own

    @property
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

    @property
    def max_inputs(self) -> int:
        """Inputs in flight that one replica takes for this service."""
        if self.concurrent is not None:
            return self.concurrent.max_inputs
        sizes = [m.batched.max_batch_size for m in self.methods.values() if m.batched]
        return 2 * max(sizes) if sizes else 1

    @property
    def target_inputs(self) -> int:
        """Inputs in flight that one replica is meant to have."""
        return self.max_inputs if self.concurrent is None else self.concurrent.target_inputs


def placement(
    device: gpu.Gpu | None,
    queue: Any,
    min_workers: object,
    max_workers: object,
    timeout: object,
    max_queue_time: object,
) -> Placement:
    """Return the checked placement of a service.

    Raises:
        DeclarationError: naming the argument that breaks its rule.
    """
    _require_queue(queue)
    least = check.integer("min_workers", min_workers, 0)
    most = None if max_workers is None else check.integer("max_workers", max_workers, 1)
    if most is not None and most < least:
        raise errors.DeclarationError(
            "max_workers", most, f"must not be less than min_workers={least}"
        )
    return Placement(
        gpu=device,
        queue=queue,
        min_workers=least,
        max_workers=most,
        timeout=check.optional("timeout", timeout),
        max_queue_time=check.optional("max_queue_time", max_queue_time),
    )


def from_function(fn: AnyFunction, where: Placement, mark: markers.TaskMark) -> Service:
    """Return the service that ``@app.remote`` makes of an ``async def``.

    Args:
        fn: the decorated function.
        where: its placement.
        mark: the arguments for its task.

    Raises:
        DeclarationError: for anything but an ``async def``, or a benchmark that does not fit it.
    """
    if not inspect.isfunction(fn):
        raise errors.DeclarationError("fn", fn, "@app.remote decorates a function")
    members.require_one_answer("fn", fn)
    if not inspect.iscoroutinefunction(fn):
        raise errors.DeclarationError(
            "fn", fn.__qualname__, "a remote function is asynchronous: write `async def`"
        )
    is_bound = bool(mark.options.get("bind"))
    if is_bound and hasattr(fn, markers.BATCHED):
        raise errors.DeclarationError("bind", True, "a batched body serves many requests at once")
    task_name = f"{fn.__module__}.{fn.__name__}"
    method = _method(fn, fn.__name__, task_name, mark, where, drop_first=is_bound)
    service = Service(
        name=fn.__name__,
        target=fn,
        placement=where,
        concurrent=getattr(fn, markers.CONCURRENT, None),
        methods={fn.__name__: method},
    )
    _require_room(service)
    return service


def from_class(cls: type, where: Placement, declared_probes: object) -> Service:
    """Return the service that ``@app.cls`` makes of a class.

    Args:
        cls: the decorated class.
        where: its placement.
        declared_probes: the argument ``probes``, unchecked.

    Raises:
        DeclarationError: for a class without methods, one that cannot be made without arguments,
            a probe that names no method, or a benchmark that does not fit its method.
    """
    members.require_instantiable(cls)
    prefix = f"{cls.__module__}.{cls.__name__}"
    methods = {
        name: _method(
            fn, name, f"{prefix}.{name}", getattr(fn, markers.METHOD), where, drop_first=True
        )
        for name, fn in members.methods(cls).items()
    }
    service = Service(
        name=cls.__name__,
        target=cls,
        placement=where,
        concurrent=getattr(cls, markers.CONCURRENT, None),
        methods=methods,
        probes=probes.require_methods(
            declared_probes, {name: method.signature for name, method in methods.items()}
        ),
        parameters=parameters.declared(cls),
        enter_hooks=members.hooks(cls, markers.ENTER),
        exit_hooks=members.hooks(cls, markers.EXIT)[::-1],
    )
    _require_room(service)
    _require_defaults(service)
    return service


def _method(
    fn: AnyFunction,
    name: str,
    task_name: str,
    mark: markers.TaskMark,
    where: Placement,
    *,
    drop_first: bool,
) -> Method:
    options.require_soft_before_hard(mark.options, where.timeout)
    if mark.options.get("pydantic") and hasattr(fn, markers.BATCHED):
        raise errors.DeclarationError(
            "pydantic", True, "a batched body takes lists: build the models in the body"
        )
    signature = _caller_signature(fn, drop_first=drop_first)
    benchmark.require_matching(mark.benchmark, signature)
    return Method(
        name=name,
        task_name=mark.options.get("name") or task_name,
        function=fn,
        signature=signature,
        is_async=inspect.iscoroutinefunction(fn),
        batched=getattr(fn, markers.BATCHED, None),
        benchmark=mark.benchmark,
        workload_calculator=mark.workload_calculator,
        options={key: value for key, value in mark.options.items() if key != "name"},
    )


def full_signature(method: Method) -> inspect.Signature:
    """The signature with its first parameter, which callers do not give."""
    return inspect.signature(method.function)


def _caller_signature(fn: AnyFunction, *, drop_first: bool) -> inspect.Signature:
    signature = inspect.signature(fn)
    if not drop_first:
        return signature
    first, *rest = signature.parameters.values() or (None,)
    if first is None:
        raise errors.DeclarationError(fn.__qualname__, str(signature), "needs a `self` parameter")
    return signature.replace(parameters=rest)


def _require_queue(queue: object) -> None:
    if queue is None:
        return
    # ``celery worker -Q`` divides at commas and takes spaces away: others could not be consumed.
    if not isinstance(queue, str) or not queue or "," in queue or queue != queue.strip():
        raise errors.DeclarationError(
            "queue", queue, "must be the name of a queue, without a comma or a space at its ends"
        )


def _require_defaults(service: Service) -> None:
    """A benchmark calls its method with the default parameters."""
    required = [name for name, parameter in service.parameters.items() if parameter.is_required]
    measured = [method.name for method in service.methods.values() if method.benchmark is not None]
    if required and measured:
        raise errors.DeclarationError(
            required[0],
            service.parameters[required[0]],
            f"needs a default, for the benchmark of {service.name}.{measured[0]} gives no value",
        )


def _require_room(service: Service) -> None:
    for method in service.methods.values():
        if method.batched is None:
            continue
        needed = method.batched.max_batch_size * method.batched.max_running_batches
        if needed > service.max_inputs:
            raise errors.DeclarationError(
                "max_inputs",
                service.max_inputs,
                f"must be at least max_batch_size x max_running_batches = {needed} for "
                f"{service.name}.{method.name}, or its batches never fill",
            )
