"""The runtime of one process: its loop, entered contexts and loaded instances.

A process has at most one ``LocalRuntime``. A worker's process, eager mode or ``gw_celery.testing``
creates it; a web process that only sends calls never does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from celery import _state
from celery.app.base import pydantic_wrapper

from gw_celery import conf, errors
from gw_celery.client import execution, task_context
from gw_celery.declare import parameters, registry, services
from gw_celery.protocol import headers
from gw_celery.runtime import (
    batcher,
    body,
    greenlet_bridge,
    instances,
    lifecycle,
    loop,
)
from gw_celery.types import ParameterValues

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LocalRuntime:
    def __init__(
        self,
        settings: conf.Settings,
        *,
        enforces_limits: bool = True,
        host: loop.Host | None = None,
        batchers: batcher.Batchers | None = None,
    ) -> None:
        self.settings = settings
        #: False if the pool itself enforces time limits.
        self.enforces_limits = enforces_limits
        #: Where inputs of batched methods gather; ``None``: each input has its own call.
        self.batchers = batchers
        self.pid = os.getpid()
        self._host = host or loop.Host()
        self.loop = self._host.loop
        self._contexts: dict[str, lifecycle.Entered] = {}
        self._served: set[str] = set()
        #: Instances of the class tasks, by service key.
        self.instances: dict[str, instances.Instances] = {}
        self._growing = asyncio.Lock()
        self._entering: list[lifecycle.Entered] = []
        self._is_blocked = False

    def start(self) -> None:
        """Start the loop; Celery's current task is then correct in bodies that run on it."""
        task_context.install()
        self._host.start()

    def enter(
        self,
        registries: Iterable[registry.Registry],
        served: Sequence[services.Service],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Enter the contexts and instances that ``served`` still needs; block until this is done.

        Contexts belong to an App and are entered when one of its services is served.

        Args:
            registries: the declarations of the Apps.
            served: the services to enter.
            check: called a few times per second; its exceptions end the load.

        Raises:
            StartupError: if one fails; it has every cause, and the entered ones are exited first.
        """
        coroutine = self.grow(registries, served)
        if self.is_on_loop():
            greenlet_bridge.drive(coroutine)
            return
        self._is_blocked = False
        deadline = time.monotonic() + self.settings.start_timeout

        def watch() -> None:
            check()
            # The loop enforces the deadline unless the load blocks it.
            if time.monotonic() >= deadline and not self._host.answers(grace):
                self._is_blocked = True
                raise loop.blocked_load(self._host, self._entering, self.settings.start_timeout)

        grace = self.settings.cancel_timeout
        greenlet_bridge.LoopCall(self.loop, coroutine).run(grace, meanwhile=watch)

    def load(self, task: Any) -> None:
        """Enter what the service of ``task`` needs, at its first use.

        Raises:
            StartupError: if a context or hook fails; the next call tries again.
        """
        if not self.serves(task.gw_service.key):
            self.enter([task.gw_registry], [task.gw_service])

    def stop(self) -> None:
        """Exit everything and end the loop; errors are logged, and waits are bounded.

        Loads in progress are cancelled. If a load blocks the loop, nothing can be exited.
        """
        if self._is_blocked:
            self._host.stop(timeout=0.0)
            return
        bound = self.settings.exit_timeout
        future = asyncio.run_coroutine_threadsafe(self.leave(), self.loop)
        try:
            # Each context and instance has its own limit; the margin lets the loop log a late one.
            future.result(2 * bound + 5)
        except TimeoutError:
            logger.error(
                "pid %d did not leave its contexts in %.0f s (setting gw_exit_timeout)",
                *(self.pid, 2 * bound + 5),
            )
        self._host.stop(timeout=5.0)

    def serves(self, service_key: str) -> bool:
        return service_key in self._served

    def context(self, key: str) -> Any:
        """Return what the ``__aenter__`` of a context returned.

        Raises:
            KeyError: if the context is not entered in this process.
        """
        life = self._contexts[key]
        if not life.value.done() or life.failure is not None:
            raise KeyError(key)
        return life.value.result()

    def is_on_loop(self) -> bool:
        return self._host.is_current()

    def can_run(self, task: Any) -> bool:
        """Return whether a body that awaits ``task`` can get the answer here, without a message.

        Its service must be loaded, and the caller must not hold a slot of it. A batched method
        takes no slot; therefore a body may await a batched method of its own service.

        Raises:
            UsageError: if a batch would wait for a batch of its service that waits for the first.
        """
        key = task.gw_service.key
        if not (self.is_on_loop() and self.serves(key)):
            return False
        if key not in batcher.held.get():
            return True
        gathers = self._gathers(task)
        if gathers and batcher.is_in_batch.get():
            raise errors.UsageError(
                f"{task.name} is awaited in a batch of its own service, and would wait for that "
                f"batch to end: call self.{task.gw_method.name}(...) with lists, or await it before"
            )
        return gathers

    def run(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the current input of ``task`` for Celery's tracer, and return its answer."""
        service, method = _declared(task)
        values = _values(service, task.request.headers)
        if method.is_async or (method.batched and self.batchers):
            return self._wait_within_limits(task, self._answer(task, values, args, kwargs))
        owner = self.instances[service.key]
        # A limit may end the input while the loop still loads. The loop appends the instance, and
        # the thread appends ``None`` at the end: the second of the two gives the instance back.
        taken: list[instances.Loaded | None] = []

        async def load() -> None:
            loaded = await owner.load(values)
            taken.append(loaded)
            if taken[0] is None:
                owner.give_back(loaded)

        try:
            if (loaded := owner.take(values)) is not None:
                taken.append(loaded)
            else:
                self._wait_within_limits(task, load())
            if (loaded := taken[0]) is None:
                raise RuntimeError("the load ended without an instance")
            fn: Callable[..., Any] = getattr(loaded.view(values), method.name)
            args, kwargs = batcher.of_one_input(method, args, kwargs)
            with body.Contained():
                answer = fn(*args, **kwargs)
            return batcher.only_answer(method, answer)
        finally:
            taken.append(None)
            if taken[0] is not None:
                owner.give_back(taken[0])

    async def run_async(
        self, task: Any, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the body of ``task`` inside the body that awaits it, and return its answer.

        Celery's wrappers around ``run`` are synchronous, and need its tracer, which we do not use.
        Only one wrapper changes what the caller gets: the conversion of pydantic models. This
        method does it instead.
        """
        task.check_arguments(args, kwargs)
        service, method = _declared(task)
        if method.is_bound:
            args = (task, *args)
        values = _values(service, options.get("headers"))
        if not method.options.get("pydantic"):
            return await self._answer(task, values, args, kwargs)
        validate, dump = _pydantic(task)
        args, kwargs = validate(*args, **kwargs)
        return dump(await self._answer(task, values, args, kwargs))

    async def _answer(
        self, task: Any, values: ParameterValues, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one input of ``task`` on the loop with the given parameter values."""
        service, method = _declared(task)
        fn, key = method.function, None
        using: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        owner, loaded = self.instances[service.key] if service.is_class else None, None
        held = batcher.held.set(batcher.held.get() | {service.key})
        batch = execution.batch.set(None)
        try:
            if owner is not None:
                loaded = owner.take(values)
                if loaded is None:
                    if (joining := batcher.joining.get()) is not None:
                        # Report the start before the load: limits then bound the wait, and the
                        # parent knows the input if the load kills the process.
                        joining.begin()
                    loaded = await owner.load(values)
                fn = getattr(loaded.view(values), method.name)
            if method.batched is not None and self.batchers is not None:
                gathering = self.batchers.of(service, method)
                if owner is not None and loaded is not None:
                    key, using = loaded.batch_key(values), functools.partial(owner.using, loaded)
                return await gathering.submit(fn, args, kwargs, key=key, using=using)
            args, kwargs = batcher.of_one_input(method, args, kwargs)
            if method.is_async:
                with body.Contained():
                    answer = await fn(*args, **kwargs)
            else:  # in a thread, because the body would block the loop
                answer = await asyncio.to_thread(body.call, fn, *args, **kwargs)
            return batcher.only_answer(method, answer)
        finally:
            if owner is not None and loaded is not None:
                owner.give_back(loaded)
            execution.batch.reset(batch)
            batcher.held.reset(held)

    def _wait_within_limits(self, task: Any, work: Coroutine[Any, Any, T]) -> T:
        if self.is_on_loop():
            return greenlet_bridge.drive(work)
        soft, hard = None, None
        if self.enforces_limits:
            hard, soft = task.request.timelimit or (None, None)
            soft, hard = soft or task.soft_time_limit, hard or task.time_limit
        waiting = greenlet_bridge.LoopCall(self.loop, work, soft, hard)
        return waiting.run(self.settings.cancel_timeout)

    async def call_eagerly(self, task: Any, send: Callable[[], Any]) -> Any:
        """Return ``send()``, an eager call of ``task``, without blocking the caller's loop.

        Each concurrent body needs its own stacks of Celery's tasks and requests. Inputs of a batch
        wait for each other, and may outnumber the threads. Such inputs therefore wait in greenlets
        on the loop of the process, as in a replica.
        """
        parent = _state.get_current_task()
        request = None if parent is None else parent.request_stack.top

        def child() -> Any:
            with contextlib.ExitStack() as stack:
                stack.callback(task_context.bind().end)
                if parent is not None and request is not None:
                    # Celery takes the parent of an eager call from the caller's stacks.
                    _state._task_stack.push(parent)
                    stack.callback(_state._task_stack.pop)
                    parent.request_stack.push(request)
                    stack.callback(parent.request_stack.pop)
                return send()

        if not (self._gathers(task) and greenlet_bridge.runs_on_loop(task)):
            return await asyncio.to_thread(child)
        stepped = greenlet_bridge.step(child)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(stepped, self.loop))

    def _gathers(self, task: Any) -> bool:
        return task.gw_method.batched is not None and self.batchers is not None

    async def grow(
        self, registries: Iterable[registry.Registry], served: Sequence[services.Service]
    ) -> None:
        """Do what ``enter`` does, on the loop; a load that blocks the loop is not detected."""
        keys = {service.key for service in served}
        async with self._growing:
            made = {
                service.key: instances.Instances(service, self.settings)
                for service in served
                if service.is_class and service.key not in self._served
            }
            entered = {
                context.key: lifecycle.Entered(
                    context.key, _opened(context), self.settings.exit_timeout
                )
                for declared in registries
                if keys & declared.services.keys()
                for context in declared.contexts.values()
                if context.key not in self._contexts
            }
            defaults = {key: life for key, owner in made.items() if (life := owner.enter_default())}
            self._contexts |= entered
            self._entering = [*entered.values(), *defaults.values()]
            try:
                await lifecycle.settle_all(self._entering, self.settings.start_timeout)
            except (errors.StartupError, asyncio.CancelledError):
                for key in entered:
                    del self._contexts[key]
                raise
            finally:
                self._entering = []
            for key, life in defaults.items():
                made[key].adopt(life)
            self.instances |= made
            self._served |= keys

    async def leave(self) -> None:
        """Cancel loads in progress; then exit all instances in parallel, then all contexts."""
        for life in self._entering:
            life.abandon()
        async with self._growing:  # an interrupted growth exits what it entered
            # Instances first: an exit hook may use a context.
            await asyncio.gather(*(owner.leave() for owner in self.instances.values()))
            await lifecycle.leave_all(list(self._contexts.values()))
            self._served.clear()
            self._contexts.clear()
            self.instances.clear()


@contextlib.asynccontextmanager
async def _opened(context: registry.Context) -> AsyncIterator[Any]:
    manager = await loop.in_thread(lambda: context.cls(*context.args, **context.kwargs))
    if hasattr(manager, "__aenter__"):
        yield await manager.__aenter__()
        await manager.__aexit__(None, None, None)
    else:
        yield await loop.in_thread(manager.__enter__)
        await loop.in_thread(manager.__exit__, None, None, None)


def _declared(task: Any) -> tuple[services.Service, services.Method]:
    return task.gw_service, task.gw_method


def _values(service: services.Service, sent: Mapping[str, Any] | None) -> ParameterValues:
    """Return all parameter values for a call with the headers ``sent``.

    They are validated again, because any client may have written the message.
    """
    text = (sent or {}).get(headers.PARAMETERS)
    if not text and not service.parameters:
        return {}
    bound = parameters.bind(service.name, service.parameters, json.loads(text) if text else {})
    return parameters.complete(service.parameters, bound)


@functools.cache
def _pydantic(task: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Return Celery's own conversions of the arguments and of the answer."""
    method: services.Method = task.gw_method
    answer = inspect.Parameter("_gw_answer", inspect.Parameter.POSITIONAL_ONLY)

    def wrapped(fn: Callable[..., Any], signature: inspect.Signature) -> Any:
        fn = functools.wraps(method.function)(fn)  # keep the body's annotations
        fn.__signature__ = signature  # type: ignore[attr-defined]
        return pydantic_wrapper(
            task.app,
            fn,
            task.name,
            method.options.get("pydantic_strict", False),
            method.options.get("pydantic_context"),
            method.options.get("pydantic_dump_kwargs"),
        )

    return (
        wrapped(lambda *args, **kwargs: (args, kwargs), method.task_signature),
        wrapped(lambda answer: answer, method.task_signature.replace(parameters=[answer])),
    )


_starting = threading.Lock()


def started(app: Any) -> LocalRuntime:
    """Return this process's runtime; start an empty one if there is none."""
    with _starting:
        runtime = execution.current()
        if not isinstance(runtime, LocalRuntime):
            runtime = LocalRuntime(conf.read(app.conf))
            runtime.start()
            # Celery's current app is per thread, and bodies may call lazily bound tasks.
            runtime.loop.call_soon_threadsafe(app.set_current)
            execution.install(runtime)
            atexit.register(execution.stop)
        return runtime
