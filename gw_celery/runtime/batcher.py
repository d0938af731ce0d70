"""Runs the batched methods of a replica: their inputs gather, and share calls."""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from celery import current_task
from celery.exceptions import Retry

from gw_celery import errors, types
from gw_celery.client import execution
from gw_celery.declare import markers, services
from gw_celery.policy import batch_buffer, batching
from gw_celery.runtime import (
    answers,
    batch_items,
    clocks,
    greenlet_bridge,
    memory,
    offload,
)

logger = logging.getLogger(__name__)


class Batcher:
    """One batched method of this replica; everything here runs on its loop.

    Args:
        method: the declaration, with the bounds of a batch.
        host: the replica that calls it.
    """

    def __init__(self, method: services.Method, host: batch_items.Host) -> None:
        declared = _declared(method)
        self._method = method
        self._host = host
        self._clock = host.clock
        self._declared = declared
        self._bounds = batch_buffer.Bounds(
            size=declared.max_batch_size,
            wait=declared.wait_ms / 1000,
            cost=declared.max_batch_cost,
        )
        self._threads = offload.Offload(
            f"batch-{method.name}", declared.max_running_batches, host.around
        )
        self._waiting = batch_buffer.Buffers()
        #: The calls that run, and the inputs that each was made for.
        self._running: dict[asyncio.Task[None], list[batch_items.Member]] = {}
        #: Those of them that nobody waits for.
        self._deserted: set[asyncio.Task[None]] = set()
        self._timer: clocks.Timer | None = None
        self._is_forming = False
        self._is_draining = False

    async def submit(
        self, work: batch_items.Work, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the answer to one input, from a call that it shares.

        Whoever stops waiting takes the input out, or drops its part of the answer: a call that
        runs is never interrupted for one of its inputs.

        Raises:
            Exception: that the body put in the place of this answer, or raised for this input;
                for a ``Retry`` in its place, what ``retry()`` of the input's task raises.
        """
        arguments = answers.bind(self._method, args, kwargs)
        key, cost = self._key(work, args, kwargs), self._cost(args, kwargs)
        one = self._waiting_for(work, arguments, key, cost)
        self._waiting.put(one)
        self._form_soon()
        try:
            is_failure, value = await one.payload.outcome
        except BaseException:  # stopped, or at its limit
            if not self._waiting.remove(one):
                self._give_up_deserted()
            raise
        if isinstance(value, Retry):
            _try_again(value)
        if is_failure:
            raise value
        return value

    def drain(self) -> None:
        """Wait for nobody any more: what is here runs as soon as the method is free."""
        self._is_draining = True
        self._form_soon()

    def _key(
        self, work: batch_items.Work, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Hashable:
        if self._declared.key is None:
            return work.key
        own = self._declared.key(*args, **kwargs)
        try:
            hash(own)
        except TypeError:
            raise errors.UsageError(
                f"key= of {self._method.task_name} returned {own!r:.100}, which cannot be hashed; "
                f"return a str, a number, or a tuple of them"
            ) from None
        # 1, 1.0 and True are equal, and three keys.
        return work.key, type(own), own

    def _waiting_for(
        self, work: batch_items.Work, arguments: Mapping[str, Any], key: Hashable, cost: int
    ) -> batch_buffer.Waiting:
        who, now = batch_items.joining.get(), self._clock.now()
        member = batch_items.Member(
            work=work,
            arguments=arguments,
            since=now,
            joining=who,
            outcome=asyncio.get_running_loop().create_future(),
        )
        return batch_buffer.Waiting(
            payload=member,
            key=key,
            since=now,
            cost=cost,
            is_urgent=who is not None and who.runs_alone,
        )

    def _cost(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        if self._declared.size_fn is None:
            return 0
        given = self._declared.size_fn(*args, **kwargs)
        try:
            cost = -1 if isinstance(given, bool) else operator.index(given)
        except TypeError:  # numpy's ints are ints, too; a float is none
            cost = -1
        if cost < 0:
            raise errors.UsageError(
                f"size_fn of {self._method.task_name} returned {given!r:.100}: the cost of an "
                f"input is an int, 0 or more"
            )
        return cost

    # -- forming --

    def _form_soon(self) -> None:
        """Form batches behind what this turn of the loop still brings."""
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
            batch = batching.next_batch(
                self._waiting, self._bounds, now, is_draining=self._is_draining
            )
            if batch is None:
                self._wait_until_due(now)
                return
            self._start(batch)

    def _wait_until_due(self, now: float) -> None:
        wait = batching.due_in(self._waiting, self._bounds, now)
        if wait is not None:
            self._timer = self._clock.call_at(now + wait, self._form, self._host.context)

    def _start(self, batch: batching.Batch) -> None:
        members = [one.payload for one in batch.members]
        task = asyncio.get_running_loop().create_task(
            self._serve(members, batch.flush),
            name=f"batch of {self._method.task_name}",
            context=self._host.context.copy(),
        )
        self._running[task] = members
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._deserted.discard(task)
        self._form_soon()

    def _give_up_deserted(self) -> None:
        """End the calls that nobody waits for any more: they keep others from being made."""
        for task, members in self._running.items():
            if task not in self._deserted and all(one.outcome.done() for one in members):
                self._deserted.add(task)
                if self._method.is_async:
                    task.cancel()
                due = self._clock.now() + self._host.grace
                look = functools.partial(self._look, task)
                self._clock.call_at(due, look, self._host.context)

    def _look(self, task: asyncio.Task[None]) -> None:
        if task in self._running:
            self._host.on_stuck(self._method.task_name)

    # -- running --

    async def _serve(self, members: list[batch_items.Member], flush: batching.Flush) -> None:
        """Answer every member, in as many calls as it takes."""
        parts = [members]
        batch_items.held.set(frozenset({members[0].work.service}))
        batch_items.is_in_batch.set(True)
        try:
            with members[0].work.using():
                while parts:
                    first, *rest = _cut(parts[0], self._bounds.size)
                    if announced := [on for one in first if (on := one.announce()) is not None]:
                        await asyncio.gather(*announced)
                    part = [one for one in first if one.begin()]
                    parts = await self._answered(part, flush) + rest + parts[1:]
        except Exception as exc:  # ours: nobody may wait for ever because of it
            logger.exception("a batch of %s broke off", self._method.task_name)
            for one in members:
                one.fail(exc)

    async def _answered(
        self, part: list[batch_items.Member], flush: batching.Flush
    ) -> list[list[batch_items.Member]]:
        """Call the body for ``part``; returns the parts to call it for again."""
        if not part:
            return []
        try:
            answer = await self._call(part, flush)
        except Exception as exc:
            return self._failed(part, exc)
        try:
            listed = answers.entries(self._method, len(part), answer)
        except Exception as exc:
            for one in part:
                one.fail(exc)
            return []
        for one, entry in zip(part, listed, strict=True):
            one.answer(entry)
        return []

    async def _call(self, part: list[batch_items.Member], flush: batching.Flush) -> Any:
        now = self._clock.now()
        waited = tuple(now - one.since for one in part)
        execution.batch.set(types.Batch(size=len(part), flush=flush.value, waited=waited))
        fn = part[0].work.fn
        args, kwargs = answers.listed(self._method, [one.arguments for one in part])
        self._host.tell()
        if self._method.is_async:
            return await greenlet_bridge.step(
                lambda: greenlet_bridge.drive(self._body(fn, args, kwargs)), greenlet_bridge.NOBODY
            )
        return await self._threads.run(self._sync_body, fn, args, kwargs)

    async def _body(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            with self._host.contained():
                return await fn(*args, **kwargs)
        except asyncio.CancelledError as exc:
            # Nobody else cancels a call that somebody waits for.
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            reason = "the body cancelled its own task; raise an Exception to fail its inputs"
            raise errors.BodyExited(reason) from exc

    def _sync_body(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            with self._host.contained():
                return fn(*args, **kwargs)
        except StopIteration as exc:  # cannot cross a future; a coroutine raises the same
            raise RuntimeError(f"the body raised {exc!r}") from exc

    # -- recovering --

    def _failed(
        self, part: list[batch_items.Member], exc: Exception
    ) -> list[list[batch_items.Member]]:
        """Isolate the input that the call failed for; returns the parts to try."""
        if all(one.outcome.done() for one in part):
            return []
        is_memory = memory.is_exhausted(exc)
        if is_memory:
            memory.free(exc)
            self._take_less(len(part), exc)
        if len(part) == 1 or (self._declared.on_error == "fail" and not is_memory):
            for one in part:
                one.fail(exc)
            return []
        logger.info(
            "a call of %s for %d inputs raised %r and is tried again in parts",
            self._method.task_name,
            len(part),
            exc,
        )
        return _cut(part, self._bounds.size if is_memory else (len(part) + 1) // 2)

    def _take_less(self, size: int, exc: Exception) -> None:
        if size == 1:
            return
        self._bounds = batching.halves(self._bounds, size)
        logger.warning(
            "a call of %s ran out of the device's memory with %d inputs (%s): until this replica "
            "restarts, it takes %d at most; lower max_batch_size, or bound size_fn's sum",
            self._method.task_name,
            size,
            type(exc).__name__,
            self._bounds.size,
        )


class Batchers:
    """The batchers of a replica, each made when its method is first called."""

    def __init__(self, host: batch_items.Host) -> None:
        self._host = host
        self._batchers: dict[str, Batcher] = {}
        self._is_draining = False

    def of(self, method: services.Method) -> Batcher:
        name = method.task_name
        if name not in self._batchers:
            self._batchers[name] = Batcher(method, self._host)
            if self._is_draining:
                self._batchers[name].drain()
        return self._batchers[name]

    def drain(self) -> None:
        """Wait for nobody any more: the replica takes nothing new."""
        self._is_draining = True
        for one in self._batchers.values():
            one.drain()


def _try_again(asked: Retry) -> None:
    """Send the input again, for a body that has no request to call ``retry()`` of."""
    when = {"countdown" if isinstance(asked.when, int | float) else "eta": asked.when}
    current_task.retry(exc=asked.exc, **when)


def _cut(members: list[batch_items.Member], size: int) -> list[list[batch_items.Member]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def _declared(method: services.Method) -> markers.Batched:
    if method.batched is None:
        raise ValueError(f"{method.task_name} is not batched")
    return method.batched
