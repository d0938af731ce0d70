"""A task with what one caller fixed: its parameters, options and time-out; a call under way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Coroutine, Generator, Mapping
from typing import Any

import amqp.basic_message
from celery import Celery, Task
from celery.app.amqp import AMQP
from celery.result import EagerResult
from kombu.messaging import Producer

from gw_celery import conf, errors
from gw_celery.client import calls, execution, results
from gw_celery.declare import check


class Spawned:
    """A call under way: ``get`` it, ``await`` it, or ``cancel`` it."""

    def __init__(self, sent: Any, task_name: str, timeout: float | None) -> None:
        self._sent = sent
        self._task_name = task_name
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Spawned {self._task_name}[{self.id}]>"

    @property
    def id(self) -> str:
        return str(self._sent.id)

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer, ``timeout`` seconds at most, and return it or raise its error.

        Raises:
            BlockingCallError: on a running event loop, or inside a task; ``await`` it there.
            CallTimeout: when it is not there in time; the call is revoked.
        """
        calls.require_may_block(f"{self._task_name}[{self.id}].get()")
        if isinstance(self._sent, EagerResult):
            return self._sent.get()
        bound = timeout if timeout is not None else self._timeout
        return results.value_of(calls.block(calls.answer(self._sent, self._task_name, bound)))

    def cancel(self) -> None:
        """Revoke the call: it is not started any more; a body that runs goes on."""
        self._sent.revoke()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._value().__await__()

    async def _value(self) -> Any:
        if isinstance(self._sent, EagerResult):
            return self._sent.get(disable_sync_subtasks=False)
        return results.value_of(await calls.answer(self._sent, self._task_name, self._timeout))


class BoundTask:
    """Call a task: ``.delay()`` and Celery's others, ``await``, ``.remote()``, ``.spawn()``.

    Args:
        task: the Celery task.
        options: Celery's ``apply_async`` options, used for every call.
        timeout: seconds that a caller waits for an answer; ``None`` for as long as it takes.
    """

    def __init__(
        self, task: Any, options: dict[str, Any] | None = None, timeout: float | None = None
    ) -> None:
        self._task = task
        self._options = options or {}
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<BoundTask {self._task.name}>"

    @property
    def task(self) -> Any:
        """The Celery task behind it."""
        return self._task

    def options(self, *, timeout: float | None = None, **options: Any) -> BoundTask:
        """Return the same task with a ``timeout`` and any option of ``apply_async``.

        Raises:
            UsageError: for an option that is nearly a known one.
        """
        _refuse_misspelt(options)
        bound = self._timeout if timeout is None else check.positive("timeout", timeout)
        return BoundTask(self._task, self._merged(options), bound)

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

    def spawn(self, *args: Any, **kwargs: Any) -> Spawned:
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
        return Spawned(sent, self._task.name, self._timeout)

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
        return results.value_of(calls.block(self._answer(args, kwargs, bound)))

    async def aremote(self, *args: Any, **kwargs: Any) -> Any:
        """Send the task and wait for its answer without blocking the event loop.

        Raises:
            CallTimeout: after ``.options(timeout=...)`` seconds.
        """
        self._require_result()
        if self._task.app.conf.task_always_eager:
            send = functools.partial(self.apply_async, args, kwargs)
            runtime = execution.started(self._task.app)
            sent = await runtime.call_eagerly(self._task, send)
            return sent.get(disable_sync_subtasks=False)
        return results.value_of(await self._answer(args, kwargs, self._timeout))

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``await task(x)``: run it here when this process serves it, send it otherwise.

        Inside a body it runs here only when that takes no second slot of a service that the
        caller holds already.
        """
        runtime = execution.current()
        if runtime is not None and runtime.can_run(self._task):
            return await runtime.run_async(self._task, self._options, args, kwargs)
        return await self.aremote(*args, **kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body in this process, entering what it needs first, and return its answer."""
        done = self._task.apply(args, kwargs, throw=True, **self._merged({}))
        return done.get(disable_sync_subtasks=False)

    def _no_canvas(self, *_: Any, **__: Any) -> Any:
        """Refused: Celery would not run the body where its model is loaded.

        Raises:
            UsageError: always, with what to write.
        """
        service, method = self._task.gw_service, self._task.gw_method
        written = f"{service.name}(...).{method.name}" if service.is_class else self._task.name
        raise errors.UsageError(
            f"{self._task.name}.map(), .starmap() and .chunks() would call the body one by one in "
            f"a plain Celery task, where its model is not loaded: write group({written}.s(x) for x "
            f"in xs)"
        )

    map = starmap = chunks = _no_canvas

    def _answer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None
    ) -> Coroutine[Any, Any, calls.Meta]:
        send = functools.partial(self.apply_async, args, kwargs)
        return calls.call(self._task.app, send, self._task.name, timeout)

    def _merged(self, options: dict[str, Any]) -> dict[str, Any]:
        merged = {**self._options, **options}
        headers = {**self._options.get("headers", {}), **(options.get("headers") or {})}
        if headers:
            merged["headers"] = headers
        return merged

    def _require_result(self) -> None:
        if self._options.get("ignore_result", self._task.ignore_result):
            raise errors.UsageError(
                f"{self._task.name} ignores its result, so there is no answer to wait for: call "
                f".delay(), or declare it with ignore_result=False"
            )


def _refuse_misspelt(options: Mapping[str, Any]) -> None:
    """Refuse what is nearly an option of a call, and would be sent in silence.

    Anything else may be meant for the broker: Celery hands what it does not know to its publisher.
    """
    stamps = options.get("stamped_headers") or ()
    for name, value in options.items():
        if name in _known_options() or name in stamps:
            continue
        if hint := errors.near_miss(name, _known_options(), "{}=", cutoff=0.8):
            raise errors.UsageError(f"options({name}={value!r}): unknown option; {hint}")


@functools.cache
def _known_options() -> frozenset[str]:
    """Ours, Celery's and kombu's, and AMQP's properties."""
    take = (Task.apply_async, Celery.send_task, AMQP.as_task_v2, Producer.publish)
    names = {name for function in take for name in inspect.signature(function).parameters}
    properties = {name for name, _ in amqp.basic_message.Message.PROPERTIES}
    unsaid = {"timeout", "queue", "exchange_type"}
    return frozenset(names | properties | unsaid) - {"self", "args", "kwargs", "options"}
