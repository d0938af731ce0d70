"""Keep ``current_task`` and ``self.request`` right inside a body that runs on the loop.

Celery keeps the running task and its request on stacks that are looked up by thread (or
greenlet). The body of an asynchronous task runs on the loop's thread while its tracer waits on
another. A context variable carries the tracer's identity into the body, the tasks that it creates
and ``to_thread``, and each stack's ``__ident_func__``, Celery's own seam, prefers it.
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
    """The identity of one tracer, for as long as its call runs.

    A task that a body created may outlive it, in the same context. The thread of the tracer then
    runs another request, which is not that task's: it has no identity but its own thread's.
    """

    ident: Any

    def end(self) -> None:
        self.ident = None


_followed: contextvars.ContextVar[Followed | None] = contextvars.ContextVar(
    "gw_identity", default=None
)


def identify() -> Any:
    """Return the identity that Celery's stacks are looked up by."""
    followed = _followed.get()
    ident = None if followed is None else followed.ident
    return threads.get_ident() if ident is None else ident


def follow(ident: Any = None) -> Followed:
    """Bind an identity, or the present one, to the context, for what will run in it elsewhere.

    The caller ends it with the call.
    """
    followed = Followed(ident or identify())
    _followed.set(followed)
    return followed


def bind() -> Followed:
    """Bind a new identity to the context, for an input that runs in no thread of its own."""
    return follow(object())


def install() -> None:
    """Make the stack of current tasks follow context variables; requests: ``follow_requests``.

    Raises:
        ConfigurationError: under ``USE_FAST_LOCALS``, whose stacks cannot be redirected.
    """
    if not hasattr(_state._task_stack, "__ident_func__"):
        raise errors.ConfigurationError(
            "USE_FAST_LOCALS is set: asynchronous tasks need Celery's ordinary stacks; unset it"
        )
    _state._task_stack.__ident_func__ = identify


def follow_requests(task: Task) -> None:
    """Make the requests of ``task`` follow context variables, too."""
    task.request_stack.__ident_func__ = identify
