"""Starts, feeds, reads and ends child processes, and watches their sockets, in the parent."""

from __future__ import annotations

import collections
import contextlib
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from gw_celery import conf
from gw_celery.gpus import devices as gpus
from gw_celery.policy import probes
from gw_celery.pool import replica, request_table
from gw_celery.protocol import frames

if TYPE_CHECKING:
    from gw_celery.pool import requests

_READ_BYTES = 256 * 1024
#: Seconds to wait for the end of a process that closed its socket or was killed.
_REAP = 0.1


class ChildProcess:
    """A process, and the parent's end of the socket pair to it. No method blocks, except ``close``.

    Args:
        number: the replica that the child fills.
        state: its state on the way to READY.
        slots: maximum inputs in flight, by service.
        devices: the devices that the child sees.
        sockets: where the parent listens to it.
    """

    def __init__(
        self,
        number: int,
        state: replica.ChildState,
        slots: Mapping[str, int],
        devices: Sequence[gpus.Device],
        sockets: Sockets,
    ) -> None:
        self.number = number
        self.state = state
        self.slots = request_table.Slots(slots)
        #: Product names of the GPUs that the child runs on.
        self.products = tuple(device.name for device in devices)
        #: Inputs that the child holds, settled or not, by number.
        self.requests: dict[int, requests.PoolRequest] = {}
        self.served = 0
        self.lag = 0.0
        self.resident_bytes = 0
        #: Why the child could not serve, in its own words.
        self.reason = ""
        #: Why the child cannot store results; "" while it can.
        self.outage = ""
        self.is_leaving = False
        #: A successor should replace the child: it is worn, stuck, or out of memory.
        self.must_go = False
        #: The log has named the inputs that keep the child from leaving.
        self.has_told = False
        #: Probes of the loaded child; ``None`` before, and where no probes are declared.
        self.checks: probes.Checks | None = None
        #: The child was never healthy: its end counts as a failed start, however long it ran.
        self.is_unfit = False
        #: A liveness probe caused the end of the child.
        self.is_ill = False
        self._sockets = sockets
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._unpacker = frames.Unpacker(frames.MAX_CHILD_FRAME_BYTES)
        self._outgoing: collections.deque[memoryview] = collections.deque()
        # A child inherits our environment; if the replica has devices, it sees only these.
        environment = {**conf.environment(), **gpus.environment(devices)}
        # This variable makes Celery expect a child of billiard with a copy of the app.
        environment.pop("FORKED_BY_MULTIPROCESSING", None)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gw_celery.replica.boot", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        sockets.add(self)

    def __repr__(self) -> str:
        return f"replica {self.number} (pid {self.pid})"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def unsettled(self) -> list[requests.PoolRequest]:
        return [held for held in self.requests.values() if held.settlement is None]

    def longest_left(self, now: float) -> float:
        """Return the seconds until the last running input reaches its hard limit.

        Infinite if an input has no limit. Inputs that have not begun do not count.
        """
        running = request_table.State.RUNNING
        limits = (held.hard_limit_at for held in self.requests.values() if held.state is running)
        return max(limits, default=now) - now

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outgoing)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, *orders: frames.OrderFields) -> None:
        """Write orders, and keep what the socket does not take now; errors appear at reading.

        The first frame says what to load, and has no ``Order``.
        """
        self._outgoing.append(memoryview(frames.pack_orders(orders)))
        self.flush()

    def flush(self) -> None:
        """Write as much as the socket takes; the rest follows when it takes more."""
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing[0])
                if sent == len(self._outgoing[0]):
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = self._outgoing[0][sent:]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._outgoing.clear()
        self._sockets.watch(self)

    def receive(self) -> Iterator[frames.ReportFields]:
        """Yield the reports that have arrived, up to any invalid bytes.

        Raises:
            Garbage: if the child wrote bytes that no child of this version writes.
            EOFError: if the child has closed its end.
        """
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            raise EOFError from None
        for frame in self._unpacker.feed(data):
            yield from frames.unpack_reports(frame)
        if self._unpacker.garbage is not None:
            raise self._unpacker.garbage
        if not data:
            raise EOFError

    def close(self) -> int | None:
        """Close the socket; return the exit code if the process ends at once."""
        self._sockets.remove(self)
        self._socket.close()
        try:
            return self.process.wait(_REAP)
        except subprocess.TimeoutExpired:
            return None


#: A child (``None`` for a wake-up), and the events that its socket is ready for.
Event = tuple[ChildProcess | None, int]


class Sockets:
    """The sockets of all children: to listen, and to write whenever a socket takes more.

    A further socket pair wakes the thread that waits for them.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakeups = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeups.setblocking(False)
        self._selector.register(self._wakeups, selectors.EVENT_READ, None)

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``wait`` would return at once."""
        return self._selector.fileno()

    def wake(self) -> None:
        """End a ``wait``; safe from any thread and from signal handlers."""
        with contextlib.suppress(OSError):  # full of wake-ups, or closed
            self._waker.send(b"\0")

    def wait(self, timeout: float) -> list[Event]:
        """Return the events for ``follow``; the caller needs no lock for this method."""
        return [(key.data, mask) for key, mask in self._selector.select(timeout)]

    def follow(self, events: list[Event]) -> Iterator[ChildProcess]:
        """Write what can be written now, and yield the children with data to read."""
        for child, mask in events:
            if child is None:
                with contextlib.suppress(BlockingIOError):
                    while self._wakeups.recv(4096):
                        pass
                continue
            if mask & selectors.EVENT_WRITE:
                child.flush()
            if mask & selectors.EVENT_READ:
                yield child

    def add(self, child: ChildProcess) -> None:
        self._selector.register(child, selectors.EVENT_READ, child)

    def remove(self, child: ChildProcess) -> None:
        """Remove a child, before its socket is closed."""
        self._selector.unregister(child)

    def watch(self, child: ChildProcess) -> None:
        """Watch for room to write only while there is something to write."""
        if child.fileno() >= 0:  # a removed child has a closed socket
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.wants_to_write else 0)
            if self._selector.get_key(child).events != events:
                self._selector.modify(child, events, child)

    def close(self) -> None:
        self._selector.close()
        self._waker.close()
        self._wakeups.close()


def describe_exit(code: int | None) -> str:
    """Describe how a process ended, in billiard's words, which tools search for."""
    if code is None:
        return "Worker exited prematurely: it closed its socket."
    if code >= 0:
        return f"Worker exited prematurely: exitcode {code}"
    names = {signum.value: signum.name for signum in signal.Signals}
    return f"Worker exited prematurely: signal {-code} ({names.get(-code, 'unknown')})"
