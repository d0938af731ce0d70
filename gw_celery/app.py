"""The App, with which users declare contexts, remote functions and class tasks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import celery
from celery import Celery
from celery.local import Proxy

from gw_celery import codec, errors, signals
from gw_celery.client import beat_tasks, bound, execution, task
from gw_celery.declare import check, gpu, markers, registry, services
from gw_celery.types import AnyFunction

C = TypeVar("C", bound=type)


class App:
    """Declares the services and contexts of a Celery app.

    Args:
        name: name of the App in error messages and logs.
        celery: the Celery app that gets the tasks. With ``None``, every Celery app of the process
            gets them, as with ``shared_task``.

    Raises:
        DeclarationError: if ``name`` is empty, or ``celery`` is not a Celery app.
    """

    def __init__(self, name: str, celery: celery.Celery | None = None) -> None:
        self.name = _require_name(name)
        self._celery = _require_celery(celery)
        self.registry = registry.Registry(name)
        if self._celery is not None:
            self.registry.join(self._celery, beside=signals.registries())
        codec.register()
        signals.connect(self.registry)
        beat_tasks.join(self._celery)

    def __repr__(self) -> str:
        return f"<App {self.name}: {len(self.registry.services)} services>"

    @property
    def celery(self) -> Any:
        """The Celery app of this App; without one, the current Celery app."""
        return self._celery or celery.current_app

    @property
    def user_options(self) -> Any:
        """Refuse ``celery -A`` with this App; Celery reads this attribute before any other.

        Raises:
            UsageError: always, with the command to write.
        """
        raise errors.UsageError(
            f"celery -A found {self!r}, which its module names `app`: name the Celery app, as in "
            f"`celery -A proj:celery`"
        )

    def context(self, *args: Any, **kwargs: Any) -> Callable[[C], C]:
        """Register a context class, which each replica instantiates with these arguments.

        The class has ``__aenter__`` and ``__aexit__`` (or ``__enter__`` and ``__exit__``). A
        replica enters all contexts in parallel, once, before it takes inputs.

        Args:
            args: positional arguments of the constructor.
            kwargs: keyword arguments of the constructor.

        Returns:
            A decorator that returns the class unchanged.

        Raises:
            DeclarationError: if the decorated object is no such class, or is registered already, or
                if the constructor refuses the arguments.
        """
        if len(args) == 1 and not kwargs and isinstance(args[0], type):
            # A bare ``@app.context`` would replace the class with a function.
            raise errors.DeclarationError(
                "context",
                args[0],
                "write @app.context() above the class, with parentheses; a class that the "
                "constructor takes is passed by its name: @app.context(model_class=...)",
            )

        def register(cls: C) -> C:
            pairs = (("__aenter__", "__aexit__"), ("__enter__", "__exit__"))
            is_context = any(all(hasattr(cls, name) for name in pair) for pair in pairs)
            if not (isinstance(cls, type) and is_context):
                raise errors.DeclarationError(
                    "context",
                    cls,
                    "must be a class with __aenter__ and __aexit__ (or __enter__, __exit__)",
                )
            context = registry.Context(cls=cls, args=args, kwargs=kwargs)
            self.registry.add_context(context, beside=signals.registries())
            return cls

        return register

    def get_context(self, cls: type) -> Any:
        """Return what a context's ``__aenter__`` returned, in a process that has entered it.

        Args:
            cls: the context class.

        Raises:
            ContextLookupError: unless the class is registered, and entered in this process. It is
                a ``KeyError``.
        """
        key = registry.context_key(cls)
        if key not in self.registry.contexts:
            raise errors.ContextLookupError(
                f"{key} is not registered: decorate it with @app.context() of App({self.name!r})"
            )
        runtime = execution.current()
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
                f"so look it up after that, in the body of a task"
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
        **task_options: Any,
    ) -> Any:
        """Declare an ``async def`` as a service: a Celery task with its own queue.

        Args:
            fn: the function, if the decorator is written without parentheses.
            gpu: the devices that one replica needs. ``None``: family ``gpu``, no device of its own.
            queue: name of the queue; default ``<family>.<function>``, such as ``gpu.A100.embed``.
            min_workers: minimum replicas of one worker with our autoscaler, 0 or more.
            max_workers: maximum replicas of one such worker; ``None``: as many as its GPUs allow.
            timeout: hard time limit of one input in seconds; ``None``: no limit.
            max_queue_time: seconds that an input may wait in the queue; default: the setting
                ``gw_max_queue_time``.
            benchmark_dataset: sample inputs, a list of dicts from parameter name to value.
            benchmark_generator: a function that returns one sample; give this or the dataset.
            benchmark_runs: timed rounds, 1 to 10000.
            benchmark_concurrency: parallel inputs of one round, 1 to 10000.
            workload_calculator: returns the workload of an input from its arguments, in your unit.
                Without it, each input counts as 1.0.
            task_options: any Celery task option, such as ``autoretry_for``, ``rate_limit`` or
                ``base``, and attributes of your own.

        Returns:
            The Celery task; without ``fn``, a decorator that returns it.

        Raises:
            DeclarationError: if an argument breaks its rule; the message names the argument, its
                value and the rule.
        """
        where = services.Placement(
            self._known(gpu), queue, min_workers, max_workers, timeout, max_queue_time
        )
        mark = markers.TaskMark(
            benchmark=markers.benchmark(
                benchmark_dataset, benchmark_generator, benchmark_runs, benchmark_concurrency
            ),
            workload_calculator=check.function("workload_calculator", workload_calculator),
            options=check.options_of_remote(task_options),
        )

        def register(function: AnyFunction) -> Any:
            (task,) = self._declare(services.from_function(function, where, mark)).values()
            return task

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
        **unknown: Any,
    ) -> Any:
        """Declare a class as a service; each of its marked methods becomes a Celery task.

        Each replica loads the class once. ``Cls(...)`` then returns a handle for calls, as in
        ``Cls().method.delay(x)`` or ``await Cls(threshold=0.7).method(x)``.

        Args:
            cls: the class, if the decorator is written without parentheses.
            gpu: the devices that one replica needs. ``None``: family ``gpu``, no device of its own.
            queue: name of the queue; default ``<family>.<class>``, such as ``gpu.A100.Embedder``.
            min_workers, max_workers, timeout, max_queue_time: as for ``remote``.
            probes: a list of ``gw.Probe.on(...)``.
            unknown: any other argument, which is refused; the message says where to write it.

        Returns:
            The class; without ``cls``, a decorator that returns it.

        Raises:
            DeclarationError: if an argument breaks its rule; the message names the argument, its
                value and the rule.
        """
        check.unknown_of_class(unknown)
        where = services.Placement(
            self._known(gpu), queue, min_workers, max_workers, timeout, max_queue_time
        )

        def register(target: C) -> C:
            service = services.from_class(target, where, probes)
            bound.install(service, self._declare(service))
            return target

        return register if cls is None else register(cls)

    def _known(self, device: Any) -> gpu.Gpu | None:
        return gpu.require_known(device, lambda: self.celery.conf.get("gw_gpu_kinds") or ())

    def _declare(self, service: services.Service) -> dict[str, Any]:
        """Register a service and return the Celery tasks of its methods by name."""
        for method in service.methods.values():
            task.require_options(method)
        self.registry.add_service(service, beside=signals.registries())
        tasks = {}
        for name, method in service.methods.items():
            codec.register_annotations(method.function)
            tasks[name] = task.register(self._celery, self.registry, service, method)
        for app in list(self.registry.celery_apps):
            if app.finalized:  # otherwise the app calls ``schedule`` when it is finalized
                beat_tasks.schedule(app)
        return tasks


def _require_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise errors.DeclarationError(
            "name", name, 'must be a name: write gw.App("search", celery_app)'
        )
    return name


def _require_celery(value: Any) -> Any:
    if type(value) is Proxy:  # ``celery.current_app`` is another app in each thread
        return value._get_current_object()
    if value is None or isinstance(value, Celery):
        return value
    raise errors.DeclarationError(
        "celery", value, "must be a Celery app, or left out for the current one"
    )
