"""A task with what one caller fixed: its parameters, options and time-out."""

from __future__ import annotations

import functools
from collections.abc import Coroutine
from typing import Any

from gw_celery import conf, errors
from gw_celery.client import async_result, calls, local_calls, watcher
from gw_celery.client import local as client_local
from gw_celery.client import options as call_options
from gw_celery.client import results as client_results
from gw_celery.declare import check
from gw_celery.runtime import in_process

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
        """Return the same task with a ``timeout`` and any option of ``apply_async``.

        Raises:
            UsageError: for an option that is nearly a known one.
        """
        call_options.refuse_misspelt(given)
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

    def spawn(self, *args: Any, **kwargs: Any) -> async_result.Spawned:
        """Send the task and return a handle to ``get``, ``await`` or ``cancel``.

        Raises:
            CallTimeout: when it could not be sent in ``.options(timeout=...)`` seconds.
        """
        self._require_result()
        if self._task.app.conf.task_always_eager:
            sent = self.apply_async(args, kwargs)
        else:
            send = functools.partial(self.apply_async, args, kwargs)
            sent = calls.send_now(self._task.app, send, self._task.name, self._timeout)
        return async_result.Spawned(sent, self._task.name, self._timeout)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task, block until it is answered, and return its value or raise its error.

        Raises:
            BlockingCallError: on a running event loop, or inside a task.
            CallTimeout: after ``.options(timeout=...)`` or ``gw_call_timeout`` seconds.
        """
        calls.require_may_block(f"{self._task.name}.remote()")
        self._require_result()
        if self._task.app.conf.task_always_eager:
            # Celery's flag of "inside a task" is the whole process's: another thread's, here.
            return self.apply_async(args, kwargs).get(disable_sync_subtasks=False)
        bound = self._timeout
        if bound is None:
            bound = conf.read(self._task.app.conf).call_timeout
        return client_results.value_of(calls.block(self._answer(args, kwargs, bound)))

    async def aremote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task and wait for its answer without blocking the event loop.

        Raises:
            CallTimeout: after ``.options(timeout=...)`` seconds.
        """
        self._require_result()
        if self._task.app.conf.task_always_eager:
            sent = await client_local.apart(
                self._task, functools.partial(self.apply_async, args, kwargs)
            )
            return sent.get(disable_sync_subtasks=False)
        return client_results.value_of(await self._answer(args, kwargs, self._timeout))

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``await task(x)``: run it here when this process serves it, send it otherwise.

        Inside a body it runs here only when that takes no second slot of a service that the
        caller holds already.
        """
        runtime = in_process.current()
        if runtime is not None and local_calls.can_run(self._task, runtime):
            return await local_calls.run(self._task, runtime, self._given, args, kwargs)
        return await self.aremote(*args, **kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body in this process, entering what it needs first, and return its answer."""
        done = self._task.apply(args, kwargs, throw=True, **self._merged({}))
        return done.get(disable_sync_subtasks=False)

    def map(self, it: Any) -> Any:
        """Refused: Celery's would not run the body where its model is."""
        raise self._not_for_canvas("map")

    def starmap(self, it: Any) -> Any:
        """Refused, as ``map``."""
        raise self._not_for_canvas("starmap")

    def chunks(self, it: Any, n: int) -> Any:
        """Refused, as ``map``."""
        raise self._not_for_canvas("chunks")

    def _answer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None
    ) -> Coroutine[Any, Any, watcher.Meta]:
        send = functools.partial(self.apply_async, args, kwargs)
        return calls.call(self._task.app, send, self._task.name, timeout)

    def _merged(self, options: dict[str, Any]) -> dict[str, Any]:
        merged = {**self._given, **options}
        headers = {**self._given.get("headers", {}), **(options.get("headers") or {})}
        if headers:
            merged["headers"] = headers
        return merged

    def _not_for_canvas(self, name: str) -> errors.UsageError:
        service = self._task.gw_service
        method = self._task.gw_method.name
        written = f"{service.name}(...).{method}" if service.is_class else self._task.name
        return errors.UsageError(
            f"{self._task.name}.{name}() would call the body one by one in a plain Celery task, "
            f"where its model is not loaded: write group({written}.s(x) for x in xs)"
        )

    def _require_result(self) -> None:
        if self._given.get("ignore_result", self._task.ignore_result):
            raise errors.UsageError(
                f"{self._task.name} ignores its result, so there is no answer to wait for: call "
                f".delay(), or declare it with ignore_result=False"
            )
