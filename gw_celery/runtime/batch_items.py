"""What a batcher is given: the replica that it runs in, and the inputs that share a call."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from gw_celery import errors
from gw_celery.runtime import body_guard, clocks


class Joining(Protocol):
    """An input of the replica that may join a batch."""

    @property
    def runs_alone(self) -> bool: ...

    def announce(self) -> Awaitable[None] | None:
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


def _as_it_is(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """The replica, as its batchers see it."""

    #: Surrounds a body, so that no exit gets out of it.
    contained: Callable[[], AbstractContextManager[Any]] = body_guard.Contained
    #: Calls what it is given, with whatever must surround work in a thread.
    around: Callable[..., Any] = _as_it_is
    #: Sends what the inputs reported as they began, before the body can do any harm.
    tell: Callable[[], None] = lambda: None
    #: Told which task's call goes on though nobody waits for it any more, and cannot be ended.
    on_stuck: Callable[[str], None] = lambda name: None
    #: Seconds that such a call has to end.
    grace: float = 5.0
    #: By which inputs wait.
    clock: clocks.Clock = dataclasses.field(default_factory=clocks.Monotonic)
    #: Of the calls: it belongs to no input.
    context: contextvars.Context = dataclasses.field(default_factory=contextvars.copy_context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a call of the method needs besides its arguments."""

    #: The body, bound to the instance whose parameters the inputs share.
    fn: Callable[..., Any]
    #: Key of the service that the call belongs to.
    service: str
    #: Inputs of different keys never share a call.
    key: Hashable = None
    #: Held while the call runs: it may outlive every input that asked for it.
    using: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(eq=False, kw_only=True)
class Member:
    """One input of a call, and who waits for its answer."""

    work: Work
    arguments: Mapping[str, Any]
    since: float
    joining: Joining | None
    #: Whether the input failed, and its answer or exception.
    outcome: asyncio.Future[tuple[bool, Any]]

    def announce(self) -> Awaitable[None] | None:
        """Have on record what must be before it begins; ``None`` when there is nothing."""
        if self.joining is None or self.outcome.done():
            return None
        return self.joining.announce()

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
