"""What the body that runs in this context is part of."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Awaitable
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One call of a batched method, as its body sees it."""

    #: Inputs of this call.
    size: int
    #: Why it was closed: ``"full"``, ``"due"`` or ``"drain"``.
    flush: str
    #: Seconds that each input waited in the replica, in the order of the lists.
    waited: tuple[float, ...]


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
#: The call that the body is; ``None`` for one of a single input.
batch: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("gw_batch", default=None)
#: Whether a batch waits for the body, which may be one that it awaits.
is_in_batch: contextvars.ContextVar[bool] = contextvars.ContextVar("gw_in_batch", default=False)


def current_batch() -> Batch | None:
    """Return the call that a batched body is running as: its size, and how long its inputs waited.

    ``None`` outside the body of a batched method, and where no batches are formed: on Celery's
    own pools, and in eager mode.
    """
    return batch.get()
