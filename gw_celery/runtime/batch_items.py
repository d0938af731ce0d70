"""The inputs of a batched method: each for itself, and as the lists of one call."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from gw_celery import errors
from gw_celery.declare import services
from gw_celery.policy import batching


class Joining(Protocol):
    """An input of the replica that may join a batch."""

    @property
    def runs_alone(self) -> bool: ...

    def record_early_ack(self) -> Awaitable[None] | None:
        """Have on record what must be before the input starts; ``None`` for nothing."""

    def begin(self) -> bool:
        """Start; whether the input still wants to."""


#: Keys of the services whose slots the body holds.
held: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "gw_held", default=frozenset()
)
#: The input that the body belongs to; ``None`` for a call that many share.
joining: contextvars.ContextVar[Joining | None] = contextvars.ContextVar("gw_joining", default=None)
#: Whether a batch waits for the body, which may be one that it awaits.
is_in_batch: contextvars.ContextVar[bool] = contextvars.ContextVar("gw_in_batch", default=False)


@dataclasses.dataclass(eq=False, kw_only=True)
class BatchItem(batching.Waiting):
    """One input of a batched method, from when it waits until it has its answer."""

    #: The body, bound to the instance whose parameters the inputs of a batch share.
    fn: Callable[..., Any]
    #: Held while the call runs: it may outlive every input that asked for it.
    using: Callable[[], AbstractContextManager[Any]]
    #: Every parameter of the body, by name.
    arguments: Mapping[str, Any]
    joining: Joining | None
    #: Whether the input failed, and its answer or exception.
    outcome: asyncio.Future[tuple[bool, Any]]

    def record_early_ack(self) -> Awaitable[None] | None:
        """Have on record what must be before it begins; ``None`` when there is nothing."""
        if self.joining is None or self.outcome.done():
            return None
        return self.joining.record_early_ack()

    def begin(self) -> bool:
        """Join a call; whether it still wants to."""
        if self.outcome.done():
            return False
        return self.joining is None or self.joining.begin()

    def answer(self, entry: Any) -> None:
        if isinstance(entry, BaseException) and not isinstance(entry, Exception):
            entry = errors.BodyExited(f"the body answered with {entry!r}: answer with an Exception")
        self._settle(isinstance(entry, Exception), entry)

    def fail(self, exc: BaseException) -> None:
        self._settle(True, exc)

    def _settle(self, is_failure: bool, value: Any) -> None:
        if not self.outcome.done():
            self.outcome.set_result((is_failure, value))


def bind(method: services.Method, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every parameter of the body with the value that one caller gave, or its default."""
    bound = method.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def of_one_input(
    method: services.Method, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call for one input alone: a batched body takes lists of one."""
    return (
        (args, kwargs) if method.batched is None else listed(method, [bind(method, args, kwargs)])
    )


def only_answer(method: services.Method, answer: Any) -> Any:
    """Return what a call for one input alone answers to it.

    Raises:
        Exception: that a batched body put in the place of its only entry.
    """
    if method.batched is None:
        return answer
    (entry,) = entries(method, 1, answer)
    if isinstance(entry, Exception):
        raise entry
    return entry


def listed(
    method: services.Method, inputs: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of one call for ``inputs``: each parameter is a list."""
    lists = {
        name: [arguments[name] for arguments in inputs] for name in method.signature.parameters
    }
    call = inspect.BoundArguments(method.signature, lists)
    return call.args, call.kwargs


def entries(method: services.Method, count: int, answer: Any) -> list[Any]:
    """Return the entries of a batched body's answer to ``count`` inputs.

    Raises:
        UsageError: when the answer is no list, tuple, array or tensor of ``count`` entries.
    """
    is_listed = not isinstance(answer, str | bytes | bytearray) and (
        isinstance(answer, Sequence) or hasattr(answer, "__array__")
    )
    size = _size(answer)
    if not is_listed or size != count:
        raise errors.UsageError(
            f"{method.task_name} got {count} input{'' if count == 1 else 's'} and answered with a "
            f"{type(answer).__name__} of {'no' if size is None else size} entries; a batched "
            f"function returns a list with one entry for each input"
        )
    return list(answer)


def _size(answer: Any) -> int | None:
    try:
        return len(answer)
    except TypeError:  # a number, a generator, an array without dimensions
        return None
