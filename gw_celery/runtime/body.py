"""What a body raises that is no ``Exception``, and what is raised in it from another thread.

Celery's tracer lets the former through. It takes a ``SystemExit`` for the end of its process:
prefork delivers the input again, and loads the model again for it, for ever. Anything else, such as
the panic of a library written in Rust, kills the solo worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import greenlet
from billiard import common
from celery.exceptions import WorkerShutdown, WorkerTerminate
from kombu.utils.encoding import safe_repr

from gw_celery import errors
from gw_celery.client import execution

T = TypeVar("T")

#: Turns: far more than the interpreter needs to deliver what is pending.
_LONGEST_WAIT = 10_000_000


class Contained:
    """Runs a body; what it raises that is no ``Exception`` becomes a ``BodyExited``.

    What ends the process, and what asyncio interrupts a body with, is left alone. A class and no
    generator: the frames of contextlib would show in the traceback of the task.
    """

    def __enter__(self) -> None:
        self._task = _current_task()

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None or isinstance(exc, Exception | execution.Stopped):
            return
        if self._is_from_outside(exc):
            return
        consequence = "is no Exception, and would leave its task without an answer"
        if isinstance(exc, SystemExit | KeyboardInterrupt):
            consequence = "would end its process"
        raise errors.BodyExited(
            f"the body raised {safe_repr(exc)}, which {consequence}: raise an Exception to fail "
            f"its task"
        ) from exc

    def _is_from_outside(self, exc: BaseException) -> bool:
        """Whether it was raised in the body, and not by it."""
        if isinstance(exc, SystemExit | KeyboardInterrupt):
            return _ends_process(exc)
        if isinstance(exc, asyncio.CancelledError):
            return self._task is not None and self._task.cancelling() > 0
        # What closes a coroutine or a greenlet that is stepped no more does not do so from the
        # task that stepped it.
        is_closing = isinstance(exc, GeneratorExit | greenlet.GreenletExit)
        return is_closing and self._task is not _current_task()


def call(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run a synchronous body, contained, in a thread that a coroutine waits for."""
    try:
        with Contained():
            return fn(*args, **kwargs)
    except StopIteration as exc:  # cannot cross a future; a coroutine raises the same
        raise errors.BodyExited(f"the body raised {exc!r}: raise another Exception") from exc


def _current_task() -> asyncio.Task[Any] | None:
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def _ends_process(exc: BaseException) -> bool:
    """Whether a handler of signals raised it, which interrupts what the main thread does."""
    if isinstance(exc, WorkerShutdown | WorkerTerminate):  # Celery's, on solo
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    if common._should_have_exited[0]:  # billiard's, in a child of prefork that is told to end
        return True
    # Ctrl-C of a user who runs a body in a shell or in a test.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(exc, KeyboardInterrupt) and is_default


class Thrown:
    """An exception of ``kind`` on its way into ``thread``; it knows when it has arrived.

    It is never taken back: on CPython 3.11 and 3.12 taking it back leaves the interpreter looking
    for it for ever, and the thread hangs as soon as a profiler or debugger traces it.
    """

    def __init__(self, thread: int, kind: type[BaseException]) -> None:
        self.has_arrived = False

        def arrive(exc: BaseException, *args: object) -> None:
            kind.__init__(exc, *args)
            self.has_arrived = True

        # Only a class can be thrown. Its own subclass is known by the name of `kind`.
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        self._kind: type[BaseException] = type(
            kind.__name__, (kind,), {"__init__": arrive, **names}
        )
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(self._kind)
        )

    def wait(self) -> None:
        """In its thread: let it arrive here, where it does nothing, if it has not arrived yet."""
        try:
            for _ in range(_LONGEST_WAIT):
                if self.has_arrived:
                    return
        except self._kind:
            return
