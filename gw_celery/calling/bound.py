"""A task with what one caller fixed: its parameters, options and time-out."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from celery._state import get_current_task, task_join_will_block

from gw_celery import conf, errors
from gw_celery.calling import eager, results, waiting
from gw_celery.declare import check
from gw_celery.runtime import invoke, process

#: Message header with the parameter values of a class task, as canonical JSON.
PARAMETERS = "gw_params"


class BoundTask:
    """Call a task: ``.delay()`` and Celery's others, ``await``, ``.remote()``, ``.spawn()``.

    Args:
        task: the Celery task.
        given: Celery's ``apply_async`` options, used for every call.
        timeout: seconds that a caller waits for an answer; ``None`` for as long as it takes.
    """

    def __init__(
        self, task: Any, given: dict[str, Any] | None = None, timeout: float | None = None
    ) -> None:
        self._task = task
        self._given = given or {}
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<BoundTask {self._task.name}>"

    @property
    def task(self) -> Any:
        """The Celery task behind it."""
        return self._task

    def options(self, *, timeout: float | None = None, **given: Any) -> BoundTask:
        """Return the same task with a ``timeout`` and any option of ``apply_async``."""
        bound = self._timeout if timeout is None else check.positive("timeout", timeout)
        return BoundTask(self._task, self._merged(given), bound)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task and return its ``AsyncResult``, as in Celery."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the task with Celery's options and return its ``AsyncResult``."""
        return self._task.apply_async(args, kwargs, **self._merged(options))

    def signature(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Return Celery's signature of a call, for chains, groups and chords."""
        immutable = options.pop("immutable", False)
        return self._task.signature(args, kwargs, self._merged(options), immutable=immutable)

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Shortcut for ``.signature(args, kwargs)``."""
        return self.signature(args, kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Any:
        """Shortcut for an immutable signature."""
        return self.signature(args, kwargs, immutable=True)

    def spawn(self, *args: Any, **kwargs: Any) -> results.Spawned:
        """Send the task and return a handle to ``get``, ``await`` or ``cancel``."""
        self._require_result()
        sent = self.apply_async(args, kwargs)
        return results.Spawned(sent, self._task.name, self._timeout)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task, block until it is answered, and return its value or raise its error.

        Raises:
            BlockingCallError: on a running event loop, or inside a task.
            CallTimeout: after ``.options(timeout=...)`` or ``gw_call_timeout`` seconds.
        """
        waiting.require_no_loop(f"{self._task.name}.remote()")
        if task_join_will_block() and get_current_task() is not None:
            raise errors.BlockingCallError(
                f"{self._task.name}.remote() inside a task would hold a worker while it waits for "
                f"another one: chain the tasks, or `await` it in an asynchronous task"
            )
        bound = self._timeout
        if bound is None:
            bound = conf.read(self._task.app.conf).call_timeout
        return self.spawn(*args, **kwargs).get(timeout=bound)

    async def aremote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task and wait for its answer without blocking the event loop.

        Raises:
            CallTimeout: after ``.options(timeout=...)`` seconds.
        """
        self._require_result()
        if self._task.app.conf.task_always_eager:
            sent = await asyncio.to_thread(eager.apart, self.apply_async, args, kwargs)
            return await waiting.answer(sent, self._task.name, self._timeout)
        watch = waiting.watcher(self._task.app)
        send = functools.partial(self.apply_async, args, kwargs, **watch.sending)
        publishing = asyncio.ensure_future(watch.publish(send))
        try:
            sent = await asyncio.shield(publishing)
        except asyncio.CancelledError:
            publishing.add_done_callback(functools.partial(_revoke_sent, watch))
            raise
        return await waiting.answer(sent, self._task.name, self._timeout)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``await task(x)``: run it here when this process serves it, send it otherwise.

        Inside a body it runs here only when that takes no second slot of a service that the
        caller holds already.
        """
        runtime = process.current()
        service = self._task.gw_service
        is_local = (
            runtime is not None
            and runtime.is_on_loop()
            and runtime.serves(service.key)
            and service.key not in process.held.get()
        )
        if runtime is None or not is_local:
            return await self.aremote(*args, **kwargs)
        self._task.check_arguments(args, kwargs)
        if self._task.gw_method.is_bound:
            args = (self._task, *args)
        return await invoke.run_async(runtime, self._task.input_for(self._given, args, kwargs))

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body in this process, entering what it needs first, and return its answer."""
        done = self._task.apply(args, kwargs, throw=True, **self._merged({}))
        return done.get(disable_sync_subtasks=False)

    def _merged(self, options: dict[str, Any]) -> dict[str, Any]:
        merged = {**self._given, **options}
        headers = {**self._given.get("headers", {}), **(options.get("headers") or {})}
        if headers:
            merged["headers"] = headers
        return merged

    def _require_result(self) -> None:
        if self._given.get("ignore_result", self._task.ignore_result):
            raise errors.UsageError(
                f"{self._task.name} ignores its result, so there is no answer to wait for: call "
                f".delay(), or declare it with ignore_result=False"
            )


def _revoke_sent(watch: waiting.Watcher, publishing: asyncio.Future[Any]) -> None:
    """Revoke a call whose caller gave up while it was being sent."""
    if not publishing.cancelled() and publishing.exception() is None:
        watch.publish_later(publishing.result().revoke)
