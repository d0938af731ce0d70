"""An exception that is raised in another thread, at whatever that thread is doing."""

from __future__ import annotations

import ctypes

#: Far more than the interpreter needs to deliver what is pending.
_LONGEST_WAIT = 10_000_000


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

        body = {
            "__init__": arrive,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
        }
        # Only a class can be thrown. Its own subclass is known by the name of `kind`.
        self._kind: type[BaseException] = type(kind.__name__, (kind,), body)
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
