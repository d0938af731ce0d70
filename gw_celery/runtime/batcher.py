"""Gathers inputs of batched methods and runs them in shared calls, on the loop of a replica."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import gc
import inspect
import logging
import operator
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from celery import current_task
from celery.exceptions import Retry

from gw_celery import errors, types
from gw_celery.client import execution
from gw_celery.declare import services
from gw_celery.policy import batching
from gw_celery.runtime import body, greenlet_bridge

logger = logging.getLogger(__name__)


class Joining(Protocol):
    """An input of the replica that may join a batch."""

    @property
    def runs_alone(self) -> bool: ...

    def record_early_ack(self) -> Awaitable[None] | None:
        """Return the write of the record that an early acknowledgement needs, or ``None``."""

    def begin(self) -> bool:
        """Report the start of the input; return whether its answer is still wanted."""


#: Keys of the services of which the running body holds a slot.
held: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "gw_held", default=frozenset()
)
#: The input that the body belongs to; ``None`` in a batch.
joining: contextvars.ContextVar[Joining | None] = contextvars.ContextVar("gw_joining", default=None)
#: Whether a batch waits for the body, directly or through an awaited call.
is_in_batch: contextvars.ContextVar[bool] = contextvars.ContextVar("gw_in_batch", default=False)


class Clock:
    """The machine's clock, for the waits of batches; tests may replace it."""

    def now(self) -> float:
        """Return the current time in seconds from an arbitrary start."""
        return time.monotonic()

    def call_at(
        self, when: float, callback: Callable[[], object], context: contextvars.Context
    ) -> Any:
        """Call ``callback`` at the time ``when``; return a handle with a method ``cancel``."""
        # Use the delay, because the loop's clock may start from another time.
        delay = max(0.0, when - self.now())
        return asyncio.get_running_loop().call_later(delay, callback, context=context)


@dataclasses.dataclass(eq=False, kw_only=True)
class BatchItem(batching.Waiting):
    #: The body, bound to the instance that the inputs of a batch share.
    fn: Callable[..., Any]
    #: Makes a context manager for the call; the call may outlive all its inputs.
    using: Callable[[], AbstractContextManager[Any]]
    #: The input's values of all parameters, by name.
    arguments: Mapping[str, Any]
    joining: Joining | None
    #: Whether the input failed, and its answer or exception.
    outcome: asyncio.Future[tuple[bool, Any]]

    def begin(self) -> bool:
        """Join a call; return whether the answer of the input is still wanted."""
        return not self.outcome.done() and (self.joining is None or self.joining.begin())

    def settle(self, is_failure: bool, value: Any) -> None:
        if not self.outcome.done():
            self.outcome.set_result((is_failure, value))


@dataclasses.dataclass(kw_only=True)
class Batchers:
    """The batchers of a replica, each created at the first call of its method."""

    #: Calls a function, with the setup that a thread needs.
    around: Callable[..., Any] = operator.call
    #: Sends the reports of starts at once, because the body may kill the process.
    tell: Callable[[], None] = lambda: None
    #: Called with the name of a task whose abandoned call does not end.
    on_stuck: Callable[[str], None] = lambda name: None
    #: Seconds that such a call may take to end.
    grace: float = 5.0
    #: The clock by which inputs wait.
    clock: Clock = dataclasses.field(default_factory=Clock)
    #: The context of the calls, which belong to no single input.
    context: contextvars.Context = dataclasses.field(default_factory=contextvars.copy_context)
    #: Whether the replica drains; inputs then do not wait for others.
    is_draining: bool = False

    def __post_init__(self) -> None:
        self._batchers: dict[str, Batcher] = {}

    def of(self, service: services.Service, method: services.Method) -> Batcher:
        name = method.task_name
        if name not in self._batchers:
            self._batchers[name] = Batcher(service, method, self)
        return self._batchers[name]

    def drain(self) -> None:
        """Stop waiting for further inputs: those that are here run as soon as possible."""
        self.is_draining = True
        for batcher in self._batchers.values():
            batcher.form_soon()


class Batcher:
    """The batches of one method; all methods run on the loop."""

    def __init__(self, service: services.Service, method: services.Method, host: Batchers) -> None:
        declared = method.batched
        if declared is None:
            raise ValueError(f"{method.task_name} is not batched")
        self._service = service
        self._method = method
        self._host = host
        self._clock = host.clock
        self._declared = declared
        self._bounds = batching.Bounds(
            size=declared.max_batch_size,
            wait=declared.wait_ms / 1000,
            cost=declared.max_batch_cost,
        )
        self._threads = greenlet_bridge.Offload(
            f"batch-{method.name}", declared.max_running_batches, host.around
        )
        self._waiting: batching.Buffers[BatchItem] = batching.Buffers()
        #: Running calls, and the inputs that wait for each; empty once a call is abandoned.
        self._running: dict[asyncio.Task[None], list[BatchItem]] = {}
        self._timer: Any = None
        self._is_forming = False

    async def submit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        key: Hashable = None,
        using: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Any:
        """Return the answer to one input, from a call that it shares with others.

        When a caller stops waiting, its input leaves the waiting batch, or its answer is dropped. A
        single input never interrupts a running call.

        Args:
            fn: the body, bound to the instance that the inputs share.
            args: the caller's positional arguments, one value per list of the body.
            kwargs: the caller's keyword arguments.
            key: inputs with different keys never share a call; the user's ``key=`` divides further.
            using: makes a context manager for the call; the call may outlive all its inputs.

        Raises:
            Exception: returned in place of this answer, or raised by the body. A ``Retry``
                becomes what ``retry()`` of the input's task raises.
        """
        joined = joining.get()
        item = BatchItem(
            fn=fn,
            using=using,
            arguments=_bind(self._method, args, kwargs),
            key=self._key(key, args, kwargs),
            cost=self._cost(args, kwargs),
            since=self._clock.now(),
            joining=joined,
            is_urgent=joined is not None and joined.runs_alone,
            outcome=asyncio.get_running_loop().create_future(),
        )
        self._waiting.put(item)
        self.form_soon()
        try:
            is_failure, value = await item.outcome
        except BaseException:  # stopped, or over its limit
            if not self._waiting.remove(item):
                self._give_up_deserted()
            raise
        if isinstance(value, Retry):  # a batched body has no request to retry itself
            when = {"countdown" if isinstance(value.when, int | float) else "eta": value.when}
            current_task.retry(exc=value.exc, **when)
        if is_failure:
            raise value
        return value

    def _key(self, key: Hashable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        if self._declared.key is None:
            return key
        own = self._declared.key(*args, **kwargs)
        try:
            hash(own)
        except TypeError:
            raise errors.UsageError(
                f"key= of {self._method.task_name} returned {own!r:.100}, which cannot be hashed; "
                f"return a str, a number, or a tuple of them"
            ) from None
        # 1, 1.0 and True are equal in Python, but must be three keys.
        return key, type(own), own

    def _cost(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        if self._declared.size_fn is None:
            return 0
        answer = self._declared.size_fn(*args, **kwargs)
        try:
            cost = -1 if isinstance(answer, bool) else operator.index(answer)
        except TypeError:  # numpy's ints count as ints, floats do not
            cost = -1
        if cost < 0:
            raise errors.UsageError(
                f"size_fn of {self._method.task_name} returned {answer!r:.100}: the cost of an "
                f"input is an int, 0 or more"
            )
        return cost

    # -- forming --

    def form_soon(self) -> None:
        """Form batches in the loop's next turn, with the inputs that this turn still brings."""
        if not self._is_forming:
            self._is_forming = True
            asyncio.get_running_loop().call_soon(self._form, context=self._host.context)

    def _form(self) -> None:
        self._is_forming = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self._running) < self._declared.max_running_batches:
            now = self._clock.now()
            batch = self._waiting.next_batch(self._bounds, now, is_draining=self._host.is_draining)
            if batch is None:
                wait = self._waiting.due_in(self._bounds, now)
                if wait is not None:
                    self._timer = self._clock.call_at(now + wait, self._form, self._host.context)
                return
            task = asyncio.get_running_loop().create_task(
                self._serve(batch.members, batch.flush),
                name=f"batch of {self._method.task_name}",
                context=self._host.context.copy(),
            )
            self._running[task] = batch.members
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self.form_soon()

    def _give_up_deserted(self) -> None:
        """Abandon calls for which no input waits any more, because they occupy the method."""
        for task, items in self._running.items():
            if items and all(item.outcome.done() for item in items):
                self._running[task] = []
                if self._method.is_async:
                    task.cancel()
                due = self._clock.now() + self._host.grace
                report = functools.partial(self._report_stuck, task)
                self._clock.call_at(due, report, self._host.context)

    def _report_stuck(self, task: asyncio.Task[None]) -> None:
        if task in self._running:
            self._host.on_stuck(self._method.task_name)

    # -- running --

    async def _serve(self, items: list[BatchItem], flush: batching.Flush) -> None:
        """Answer every input, in one or more calls."""
        parts = [items]
        held.set(frozenset({self._service.key}))
        is_in_batch.set(True)
        try:
            with items[0].using():
                while parts:
                    first, *rest = _cut(parts[0], self._bounds.size)
                    wanted = [item.joining for item in first if not item.outcome.done()]
                    # An early acknowledgement must be on record before the input starts.
                    records = [joined.record_early_ack() for joined in wanted if joined is not None]
                    await asyncio.gather(*filter(None, records))
                    part = [item for item in first if item.begin()]
                    parts = await self._answered(part, flush) + rest + parts[1:]
        except Exception as exc:  # the inputs need answers after an error of ours, too
            logger.exception(
                "pid %d: a batch of task %s failed: report this bug",
                *(os.getpid(), self._method.task_name),
            )
            for item in items:
                item.settle(True, exc)

    async def _answered(
        self, part: list[BatchItem], flush: batching.Flush
    ) -> list[list[BatchItem]]:
        """Call the body for ``part``; return the parts that need another call."""
        if not part:
            return []
        try:
            answer = await self._call(part, flush)
        except Exception as exc:
            return self._failed(part, exc)
        try:
            entries = _entries(self._method, len(part), answer)
        except Exception as exc:
            for item in part:
                item.settle(True, exc)
            return []
        for item, entry in zip(part, entries, strict=True):
            item.settle(isinstance(entry, Exception), entry)
        return []

    async def _call(self, part: list[BatchItem], flush: batching.Flush) -> Any:
        now = self._clock.now()
        waited = tuple(now - item.since for item in part)
        execution.batch.set(types.Batch(size=len(part), flush=flush.value, waited=waited))
        fn = part[0].fn
        args, kwargs = _listed(self._method, [item.arguments for item in part])
        self._host.tell()
        if not self._method.is_async:
            return await self._threads.run(body.call, fn, *args, **kwargs)
        try:
            return await greenlet_bridge.step(
                lambda: body.call(greenlet_bridge.drive, fn(*args, **kwargs))
            )
        except asyncio.CancelledError as exc:
            # Only the body itself cancels a call that still has waiting inputs.
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            reason = "the body cancelled its own task: raise an Exception to fail its inputs"
            raise errors.BodyExited(reason) from exc

    # -- recovering --

    def _failed(self, part: list[BatchItem], exc: Exception) -> list[list[BatchItem]]:
        """Split a failed call to isolate the input at fault; return the parts to try."""
        if all(item.outcome.done() for item in part):
            return []
        # Compare the name, to avoid an import of torch.
        is_memory = any(cls.__name__ == "OutOfMemoryError" for cls in type(exc).__mro__)
        if is_memory:
            _free_memory(exc)
            if len(part) > 1:
                self._bounds = self._bounds.halved(len(part))
                logger.warning(
                    "pid %d: a call of task %s with %d inputs ran out of device memory (%s): until "
                    "this process ends, its batches have %d inputs at most. Lower max_batch_size, "
                    "or set size_fn and max_batch_cost",
                    os.getpid(),
                    self._method.task_name,
                    len(part),
                    type(exc).__name__,
                    self._bounds.size,
                )
        if len(part) == 1 or (self._declared.on_error == "fail" and not is_memory):
            for item in part:
                item.settle(True, exc)
            return []
        logger.info(
            "pid %d: a call of task %s with %d inputs raised %r and is tried again in parts",
            *(os.getpid(), self._method.task_name, len(part), exc),
        )
        return _cut(part, self._bounds.size if is_memory else (len(part) + 1) // 2)


def _bind(method: services.Method, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = method.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _listed(
    method: services.Method, inputs: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lists = {
        name: [arguments[name] for arguments in inputs] for name in method.signature.parameters
    }
    call = inspect.BoundArguments(method.signature, lists)
    return call.args, call.kwargs


def _entries(method: services.Method, count: int, answer: Any) -> list[Any]:
    """Return the entries of a batched body's answer: a list, tuple, array or tensor."""
    is_listed = not isinstance(answer, str | bytes | bytearray) and (
        isinstance(answer, Sequence) or hasattr(answer, "__array__")
    )
    size: int | None = None
    with contextlib.suppress(TypeError):  # a number, a generator, a zero-dimensional array
        size = len(answer)
    if not is_listed or size != count:
        raise errors.UsageError(
            f"{method.task_name} got {count} input{'' if count == 1 else 's'} and answered with a "
            f"{type(answer).__name__} of {'no' if size is None else size} entries; a batched "
            f"function returns a list with one entry for each input"
        )
    return [
        errors.BodyExited(f"the body answered with {entry!r}: answer with an Exception")
        if isinstance(entry, BaseException) and not isinstance(entry, Exception)
        else entry
        for entry in answer
    ]


def of_one_input(
    method: services.Method, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call for a single input; a batched body gets lists of one."""
    if method.batched is None:
        return args, kwargs
    return _listed(method, [_bind(method, args, kwargs)])


def only_answer(method: services.Method, answer: Any) -> Any:
    """Return the answer of a call for one input, or raise the exception in its place."""
    if method.batched is None:
        return answer
    (entry,) = _entries(method, 1, answer)
    if isinstance(entry, Exception):
        raise entry
    return entry


def _cut(items: list[BatchItem], size: int) -> list[list[BatchItem]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _free_memory(exc: Exception) -> None:
    """Release the tensors of the failed call, and torch's cache."""
    raised: BaseException | None = exc
    while raised is not None:
        traceback.clear_frames(raised.__traceback__)
        raised = raised.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
