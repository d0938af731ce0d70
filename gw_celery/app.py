"""The App: what users declare contexts, remote functions and class tasks with."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import celery
from celery import _state

from gw_celery import codec, conf, errors
from gw_celery.calling import handle, outcome, task
from gw_celery.declare import benchmark, check, gpu, markers, registry, services
from gw_celery.runtime import process
from gw_celery.types import AnyFunction
from gw_celery.worker import hooks

C = TypeVar("C", bound=type)


class App:
    """Declares what a Celery app serves with loaded models.

    Args:
        name: what error messages and logs call it.
        celery: the Celery app; without one, tasks belong to every Celery app of the process, as
            those of ``shared_task`` do.
    """

    def __init__(self, name: str, celery: celery.Celery | None = None) -> None:
        self.name = name
        self.registry = registry.Registry(name)
        self._celery = celery
        codec.register()
        hooks.connect(self.registry)

    def __repr__(self) -> str:
        return f"<App {self.name}: {len(self.registry.services)} services>"

    @property
    def celery(self) -> Any:
        """The Celery app that it is bound to, else the current one."""
        return self._celery or celery.current_app

    def context(self, *args: Any, **kwargs: Any) -> Callable[[C], C]:
        """Register a context class; it is made with these arguments in each replica.

        The class has ``__aenter__`` and ``__aexit__`` (or ``__enter__`` and ``__exit__``). It is
        entered once per replica, in parallel with the others, before any input is taken.

        Raises:
            DeclarationError: for anything but such a class, or one that is registered already.
        """

        def register(cls: C) -> C:
            _require_context(cls)
            self.registry.add_context(registry.Context(cls=cls, args=args, kwargs=kwargs))
            outcome.know_module(cls.__module__)
            return cls

        return register

    def get_context(self, cls: type) -> Any:
        """Return what the context's ``__aenter__`` returned, inside a replica.

        Raises:
            ContextLookupError: a ``KeyError``, when it is not registered or not entered here.
        """
        key = registry.context_key(cls)
        if key not in self.registry.contexts:
            raise errors.ContextLookupError(
                f"{key} is not registered: decorate it with @app.context() of App({self.name!r})"
            )
        runtime = process.current()
        if runtime is None:
            raise errors.ContextLookupError(
                f"{key} is not entered in process {os.getpid()}: this is not a GPU worker; "
                f"contexts exist only in workers that consume a queue of App({self.name!r})"
            )
        try:
            return runtime.context(key)
        except KeyError:
            raise errors.ContextLookupError(
                f"{key} is not entered yet in process {os.getpid()}: contexts enter in parallel, "
                f"so one cannot look up another while it enters, nor a body before all have entered"
            ) from None

    def remote(
        self,
        fn: AnyFunction | None = None,
        *,
        gpu: gpu.Gpu | None = None,
        queue: str | None = None,
        min_workers: int = 0,
        max_workers: int | None = None,
        timeout: float | None = 300.0,
        max_queue_time: float | None = None,
        benchmark_dataset: Any = None,
        benchmark_generator: Any = None,
        benchmark_runs: int = 10,
        benchmark_concurrency: int = 10,
        workload_calculator: AnyFunction | None = None,
        **options: Any,
    ) -> Any:
        """Make a Celery task of an ``async def``, served on a queue of its own.

        Args:
            gpu: the device that a replica needs.
            queue: name of its queue; default ``<family>.<function>``, such as ``gpu.A100.embed``.
            min_workers: replicas to keep, 0 or more.
            max_workers: replicas at most.
            timeout: hard time limit of one input in seconds; ``None`` for none.
            max_queue_time: seconds that an input may wait in the queue.
            benchmark_dataset: sample inputs, a list of dicts of parameter names.
            benchmark_generator: or a function that returns one.
            benchmark_runs: timed rounds.
            benchmark_concurrency: parallel inputs of one round.
            workload_calculator: cost of one input, from its arguments; 1.0 without it.
            options: any Celery task option, such as ``autoretry_for`` or ``rate_limit``.

        Raises:
            DeclarationError: when an argument breaks its rule; the message names all three.
        """
        where = self._placement(gpu, queue, min_workers, max_workers, timeout, max_queue_time)
        mark = markers.TaskMark(
            benchmark=benchmark.declare(
                benchmark_dataset, benchmark_generator, benchmark_runs, benchmark_concurrency
            ),
            workload_calculator=check.function("workload_calculator", workload_calculator),
            options=options,
        )

        def register(function: AnyFunction) -> Any:
            service = services.from_function(function, where, mark)
            self._add(service)
            (method,) = service.methods.values()
            return self._task(service, method)

        return register if fn is None else register(fn)

    def cls(
        self,
        cls: C | None = None,
        *,
        gpu: gpu.Gpu | None = None,
        queue: str | None = None,
        min_workers: int = 0,
        max_workers: int | None = None,
        timeout: float | None = 300.0,
        max_queue_time: float | None = None,
        probes: Any = (),
    ) -> Any:
        """Make Celery tasks of the methods of a class that is loaded once per replica.

        The arguments are those of ``remote``; ``probes`` is a list of ``gw.Probe.on(...)``.
        ``Cls(...)`` then makes a light handle: ``Cls().method.delay(x)``, ``await
        Cls(threshold=0.7).method(x)``.

        Raises:
            DeclarationError: when an argument breaks its rule; the message names all three.
        """
        where = self._placement(gpu, queue, min_workers, max_workers, timeout, max_queue_time)

        def register(target: C) -> C:
            service = services.from_class(target, where, probes)
            self._add(service)
            tasks = {one.name: self._task(service, one) for one in service.methods.values()}
            handle.install(service, tasks)
            return target

        return register if cls is None else register(cls)

    def _placement(
        self,
        device: Any,
        queue: object,
        min_workers: object,
        max_workers: object,
        timeout: object,
        max_queue_time: object,
    ) -> services.Placement:
        return services.placement(
            queue=queue,
            min_workers=min_workers,
            max_workers=max_workers,
            timeout=timeout,
            max_queue_time=max_queue_time,
            device=gpu.require_known(device, self._added_kinds),
        )

    def _added_kinds(self) -> tuple[str, ...]:
        return tuple(self.celery.conf.get("gw_gpu_kinds") or ())

    def _add(self, service: services.Service) -> None:
        self.registry.add_service(service)
        outcome.know_module(service.target.__module__)
        for method in service.methods.values():
            codec.register_annotations(method.function)
            outcome.know_exceptions(method.options)

    def _task(self, service: services.Service, method: services.Method) -> Any:
        options = {
            "time_limit": service.placement.timeout,
            **method.options,
            "name": method.task_name,
            "base": self._base_class(),
            "gw_service": service,
            "gw_method": method,
            "gw_registry": self.registry,
        }
        decorate = celery.shared_task if self._celery is None else self._celery.task
        return decorate(**options)(_runner(method))

    def _base_class(self) -> type:
        if self._celery is not None:
            return task.base_class(self._celery.task_cls)
        # Tasks of a Django project have delay_on_commit().
        is_django = conf.is_django_project()
        return task.base_class(
            "celery.contrib.django.task:DjangoTask" if is_django else "celery.app.task:Task"
        )


def _runner(method: services.Method) -> Callable[..., Any]:
    """Return the synchronous function that Celery sees: its wrappers expect one on every pool."""

    @functools.wraps(method.function)
    def run(*args: Any, **kwargs: Any) -> Any:
        current = _state.get_current_task()
        if current is None or current.name != method.task_name:
            raise errors.UsageError(
                f"{method.task_name}.run() is what a worker calls: write .local(...) to run it "
                f"here, or .delay(...), .remote(...) or `await` to send it"
            )
        return current.execute(args, kwargs)

    run.__signature__ = (  # type: ignore[attr-defined]
        services.full_signature(method) if method.is_bound else method.signature
    )
    return run


def _require_context(cls: object) -> None:
    pairs = (("__aenter__", "__aexit__"), ("__enter__", "__exit__"))
    is_context = isinstance(cls, type) and any(
        all(hasattr(cls, name) for name in pair) for pair in pairs
    )
    if not is_context:
        raise errors.DeclarationError(
            "context", cls, "must be a class with __aenter__ and __aexit__ (or __enter__, __exit__)"
        )
