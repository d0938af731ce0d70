"""Keeps ``current_task`` and ``self.request`` correct in a body that runs on the loop.

Celery finds the running task and its request on stacks, by thread or greenlet. An asynchronous body
runs on the loop's thread while its tracer waits on another. A context variable carries the tracer's
identity into the body, the asyncio tasks that it creates and ``to_thread``. The ``__ident_func__``
of each stack, a seam of Celery's, reads it. Every process that runs our tasks uses this.
"""

from __future__ import annotations

import contextvars
import dataclasses
from typing import Any

from celery import _state
from celery.app.task import Task
from celery.utils import threads

from gw_celery import errors


@dataclasses.dataclass
class Followed:
    """The identity of one tracer during its call.

    An asyncio task that a body created may outlive the call in the same context. By then the
    tracer's thread runs another request, so that this task gets the identity of its own thread.
    """

    ident: Any

    def end(self) -> None:
        self.ident = None


_followed: contextvars.ContextVar[Followed | None] = contextvars.ContextVar(
    "gw_identity", default=None
)


def identify() -> Any:
    """Return the identity by which Celery's stacks are searched."""
    followed = _followed.get()
    ident = None if followed is None else followed.ident
    return threads.get_ident() if ident is None else ident


def follow(ident: Any = None) -> Followed:
    """Bind an identity (default: the current one) to the context, for code that runs elsewhere.

    The caller calls ``end`` when the call is over.
    """
    followed = Followed(ident or identify())
    _followed.set(followed)
    return followed


def bind() -> Followed:
    """Bind a new identity to the context, for an input without a thread of its own."""
    return follow(object())


def install() -> None:
    """Make Celery's stack of current tasks follow context variables.

    Raises:
        ConfigurationError: under ``USE_FAST_LOCALS``, whose stacks cannot be redirected.
    """
    if not hasattr(_state._task_stack, "__ident_func__"):
        raise errors.ConfigurationError(
            "USE_FAST_LOCALS is set: asynchronous tasks need Celery's ordinary stacks; unset it"
        )
    _state._task_stack.__ident_func__ = identify


def follow_requests(task: Task) -> None:
    """Make the requests of ``task`` follow context variables too."""
    task.request_stack.__ident_func__ = identify
