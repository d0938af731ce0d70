"""Contains what a body raises that is not an ``Exception``, and throws exceptions into threads.

It runs in every process that runs bodies. Celery's tracer does not catch such an exception. It
takes ``SystemExit`` for the end of its process: prefork redelivers the input and loads the model
again, endlessly. Others, such as the panic of a Rust library, kill the solo worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
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

#: Number of loop turns; the interpreter delivers a pending exception much earlier.
_LONGEST_WAIT = 10_000_000


class Contained:
    """Runs a body, and replaces anything but an ``Exception`` with ``BodyExited``.

    It lets pass what ends the process, and what asyncio interrupts a body with. A fork that leaves
    the body ends here: its parent alone stores an outcome. It is a class because a generator's
    contextlib frames would show in the task's traceback.
    """

    def __enter__(self) -> None:
        self._task = _current_task()
        self._pid = os.getpid()

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if os.getpid() != self._pid:
            os._exit(0 if exc is None else 1)
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
        """Return whether the exception came from outside the body."""
        if isinstance(exc, SystemExit | KeyboardInterrupt):
            return _ends_process(exc)
        if isinstance(exc, asyncio.CancelledError):
            return self._task is not None and self._task.cancelling() > 0
        # An abandoned coroutine or greenlet is closed from another asyncio task than the one that
        # stepped it.
        is_closing = isinstance(exc, GeneratorExit | greenlet.GreenletExit)
        return is_closing and self._task is not _current_task()


def call(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run a synchronous body, contained, in a thread that a coroutine waits for."""
    try:
        with Contained():
            return fn(*args, **kwargs)
    except StopIteration as exc:  # cannot pass a future; coroutines do the same
        raise errors.BodyExited(f"the body raised {exc!r}: raise another Exception") from exc


def _current_task() -> asyncio.Task[Any] | None:
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def _ends_process(exc: BaseException) -> bool:
    """Return whether a signal handler raised the exception in the main thread."""
    if isinstance(exc, WorkerShutdown | WorkerTerminate):  # Celery's, on solo
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    if common._should_have_exited[0]:  # billiard's, in a prefork child that must end
        return True
    # Ctrl-C of a user who runs a body in a shell or a test.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(exc, KeyboardInterrupt) and is_default


class Thrown:
    """An exception of ``kind`` that is thrown into ``thread`` and records its arrival.

    It is never withdrawn. After a withdrawal, CPython 3.11 and 3.12 look for the exception
    endlessly: the thread hangs when a profiler or debugger traces it.
    """

    def __init__(self, thread: int, kind: type[BaseException]) -> None:
        self.has_arrived = False

        def arrive(exc: BaseException, *args: object) -> None:
            kind.__init__(exc, *args)
            self.has_arrived = True

        # Only a class can be thrown. The subclass has the name of `kind`.
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        self._kind: type[BaseException] = type(
            kind.__name__, (kind,), {"__init__": arrive, **names}
        )
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(self._kind)
        )

    def wait(self) -> None:
        """Wait in the thread until the exception arrives, and ignore it here."""
        try:
            for _ in range(_LONGEST_WAIT):
                if self.has_arrived:
                    return
        except self._kind:
            return
