"""One child process: how it is started, written to, read from, and ended; and all their sockets."""

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
#: A process that closed its socket, or was killed, is a moment from its end.
_REAP = 0.1


class ChildProcess:
    """A process and the parent's end of the socket that joins them; nothing here blocks.

    Args:
        number: the replica that it fills.
        state: where it is on its way to READY.
        slots: inputs in flight of each service.
        devices: those that it sees.
        sockets: where it is listened to.
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
        #: The GPUs that it runs on, as their maker calls them.
        self.products = tuple(device.name for device in devices)
        #: What it holds, by the numbers of the inputs, settled or not.
        self.requests: dict[int, requests.PoolRequest] = {}
        self.served = 0
        self.lag = 0.0
        self.resident_bytes = 0
        #: Why it could not serve, in its own words.
        self.reason = ""
        #: Why it cannot store results; "" while it can.
        self.outage = ""
        self.is_leaving = False
        #: Another should take its place: it is worn, stuck, or out of memory.
        self.must_go = False
        #: The log has said what keeps it from leaving.
        self.has_told = False
        #: Its probes, once it has loaded; ``None`` where there are none.
        self.checks: probes.Checks | None = None
        #: It was never well: its end counts as a start that failed, however long it lasted.
        self.is_unfit = False
        #: Its liveness probe had it ended.
        self.is_ill = False
        self._sockets = sockets
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._unpacker = frames.Unpacker(frames.MAX_CHILD_FRAME_BYTES)
        self._outgoing: collections.deque[memoryview] = collections.deque()
        # As this process's; where a replica has devices, it sees them and no others.
        environment = {**conf.environment(), **gpus.environment(devices)}
        # It makes Celery treat the process as one that billiard spawned, with a copy of the app.
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
        """What it holds that has no answer."""
        return [held for held in self.requests.values() if held.settlement is None]

    def longest_left(self, now: float) -> float:
        """Seconds until the last input that runs here reaches its hard limit.

        Infinite where one has none. What has not begun has no time of its own yet.
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
        """Write orders, keeping what the socket does not take now; errors show when reading.

        The first frame tells the child what to load, and has no ``Order``.
        """
        self._outgoing.append(memoryview(frames.pack_orders(orders)))
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes; the rest when it takes more."""
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
        """Yield the reports that are there; those before garbage count.

        Raises:
            Garbage: for bytes that no child of this version writes.
            EOFError: when the child has closed its end.
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
        """Close the socket, reap the process if it ends right now, and return its exit code."""
        self._sockets.remove(self)
        self._socket.close()
        try:
            return self.process.wait(_REAP)
        except subprocess.TimeoutExpired:
            return None


#: A child, or ``None`` for a wake-up, and what its socket is ready for.
Event = tuple[ChildProcess | None, int]


class Sockets:
    """Children that are listened to, and written to whenever their socket takes more.

    A pair of sockets beside them wakes whatever waits for them.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakeups = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeups.setblocking(False)
        self._selector.register(self._wakeups, selectors.EVENT_READ, None)

    def fileno(self) -> int:
        """One descriptor that is readable when ``wait`` would return at once."""
        return self._selector.fileno()

    def wake(self) -> None:
        """End a ``wait``; from any thread, and from the handler of a signal."""
        with contextlib.suppress(OSError):  # it is full of wake-ups, or closed
            self._waker.send(b"\0")

    def wait(self, timeout: float) -> list[Event]:
        """Return what has happened, for ``follow``; the only part that needs no lock."""
        return [(key.data, mask) for key, mask in self._selector.select(timeout)]

    def follow(self, events: list[Event]) -> Iterator[ChildProcess]:
        """Write what can be written now, and yield the children that have something to read."""
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
        """Forget a child; before its socket is closed."""
        self._selector.unregister(child)

    def watch(self, child: ChildProcess) -> None:
        """Wait for the socket to take more, only while there is more."""
        if child.fileno() >= 0:  # it is closed once it was removed
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.wants_to_write else 0)
            if self._selector.get_key(child).events != events:
                self._selector.modify(child, events, child)

    def close(self) -> None:
        self._selector.close()
        self._waker.close()
        self._wakeups.close()


def describe_exit(code: int | None) -> str:
    """Say how a process ended, in billiard's words, which tools look for."""
    if code is None:
        return "Worker exited prematurely: it closed its socket."
    if code >= 0:
        return f"Worker exited prematurely: exitcode {code}"
    names = {signum.value: signum.name for signum in signal.Signals}
    return f"Worker exited prematurely: signal {-code} ({names.get(-code, 'unknown')})"
