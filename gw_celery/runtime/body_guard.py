"""What a body raises that is no ``Exception`` is that body's failure, and of nothing else.

Celery's tracer lets it through. It takes a ``SystemExit`` for the end of its process: prefork
delivers the input again, and loads the model again for it, for ever. Anything else, such as the
panic of a library written in Rust, kills the solo worker. What ends the process, and what asyncio
interrupts a body with, is left alone.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

import greenlet
from celery.exceptions import WorkerShutdown, WorkerTerminate
from kombu.utils.encoding import safe_repr

from gw_celery import errors
from gw_celery.client import execution


class Contained:
    """Runs a body; what it raises that is no ``Exception`` becomes a ``BodyExited``.

    A class and no generator: the frames of contextlib would show in the traceback of the task.

    Args:
        is_ending: whether a signal has told this process to end; an exit is then the process's.
    """

    def __init__(self, is_ending: Callable[[], bool] = lambda: False) -> None:
        self._is_ending = is_ending
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        self._task = _current_task()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if (
            exc is None
            or isinstance(exc, Exception | execution.Stopped)
            or self._is_from_outside(exc)
        ):
            return
        raise errors.BodyExited(
            f"the body raised {safe_repr(exc)}, which {_consequence(exc)}; raise an Exception to "
            f"fail its task"
        ) from exc

    def _is_from_outside(self, exc: BaseException) -> bool:
        """Whether it was raised in the body, and not by it."""
        if isinstance(exc, SystemExit | KeyboardInterrupt):
            return self._is_of_process(exc)
        if isinstance(exc, asyncio.CancelledError):
            return self._task is not None and self._task.cancelling() > 0
        # What closes a coroutine or a greenlet that nobody steps any more does not do so from the
        # task that stepped it.
        is_closing = isinstance(exc, GeneratorExit | greenlet.GreenletExit)
        return is_closing and self._task is not _current_task()

    def _is_of_process(self, exc: BaseException) -> bool:
        # Celery raises the two classes from its handler of signals, which on solo interrupts a
        # body.
        is_celery = isinstance(exc, WorkerShutdown | WorkerTerminate)
        return is_celery or self._is_ending() or _is_ctrl_c(exc)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _consequence(exc: BaseException) -> str:
    if isinstance(exc, SystemExit | KeyboardInterrupt):
        return "would end its process"
    return "is no Exception, and would leave its task without an answer"


def _is_ctrl_c(exc: BaseException) -> bool:
    """Whether it can be the user's own, who runs a body in a shell or in a test."""
    return (
        isinstance(exc, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
