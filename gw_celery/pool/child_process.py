"""One child process: how it is started, written to, read from, and ended; and all their sockets."""

from __future__ import annotations

import collections
import dataclasses
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from gw_celery import conf
from gw_celery.gpus import devices
from gw_celery.policy import probes
from gw_celery.pool import child_state, dispatch, request
from gw_celery.protocol import frames

_READ_BYTES = 256 * 1024
#: A process that closed its socket, or was killed, is a moment from its end.
_REAP = 0.1


@dataclasses.dataclass(frozen=True)
class Received:
    """What one reading of a child's socket gave."""

    reports: Sequence[frames.ReportFields] = ()
    #: The child has closed its end.
    is_closed: bool = False
    #: After the reports came bytes that no child of this version writes.
    garbage: frames.Garbage | None = None


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
        state: child_state.ChildState,
        slots: Mapping[str, int],
        devices: Sequence[devices.Device],
        sockets: Sockets,
    ) -> None:
        self.number = number
        self.state = state
        self.slots = dispatch.Slots(slots)
        #: The GPUs that it runs on, as their maker calls them.
        self.products = tuple(device.name for device in devices)
        #: What it holds, by the numbers of the inputs, settled or not.
        self.requests: dict[int, request.PoolRequest] = {}
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
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gw_celery.replica.boot", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(devices),
                stdin=subprocess.DEVNULL,
            )
        sockets.add(self)

    def __repr__(self) -> str:
        return f"replica {self.number} (pid {self.pid})"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def unsettled(self) -> list[request.PoolRequest]:
        """What it holds that has no answer."""
        return [held for held in self.requests.values() if held.settlement is None]

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

    def receive(self) -> Received:
        """Return what is there; reports before garbage count."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return Received()
        except OSError:
            return Received(is_closed=True)
        reports: list[frames.ReportFields] = []
        try:
            for frame in self._unpacker.feed(data):
                reports += frames.unpack_reports(frame)
        except frames.Garbage as exc:
            return Received(reports, garbage=exc)
        return Received(reports, is_closed=not data, garbage=self._unpacker.garbage)

    def kill(self) -> None:
        """End the process now; it cannot refuse, not even when it is stopped."""
        if self.process.poll() is None:
            self.process.kill()

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
        self._children: set[ChildProcess] = set()
        self._waker, self._wakeups = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeups.setblocking(False)
        self._selector.register(self._wakeups, selectors.EVENT_READ, None)

    def fileno(self) -> int:
        """One descriptor that is readable when ``wait`` would return at once."""
        return self._selector.fileno()

    def wake(self) -> None:
        """End a ``wait``; from any thread, and from the handler of a signal."""
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            return  # it is full of wake-ups, or closed

    def wait(self, timeout: float) -> list[Event]:
        """Return what has happened, for ``follow``; the only part that needs no lock."""
        return [(key.data, mask) for key, mask in self._selector.select(timeout)]

    def follow(self, events: list[Event]) -> Iterator[ChildProcess]:
        """Write what can be written now, and yield the children that have something to read."""
        for child, mask in events:
            if child is None:
                self._drop_wakeups()
                continue
            if mask & selectors.EVENT_WRITE:
                child.flush()
            if mask & selectors.EVENT_READ:
                yield child

    def add(self, child: ChildProcess) -> None:
        self._children.add(child)
        self._selector.register(child, selectors.EVENT_READ, child)

    def remove(self, child: ChildProcess) -> None:
        """Forget a child; before its socket is closed."""
        self._children.remove(child)
        self._selector.unregister(child)

    def watch(self, child: ChildProcess) -> None:
        """Wait for the socket to take more, only while there is more."""
        if child in self._children:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.wants_to_write else 0)
            if self._selector.get_key(child).events != events:
                self._selector.modify(child, events, child)

    def close(self) -> None:
        self._selector.close()
        self._waker.close()
        self._wakeups.close()

    def _drop_wakeups(self) -> None:
        try:
            while self._wakeups.recv(4096):
                pass
        except BlockingIOError:
            return


def describe_exit(code: int | None) -> str:
    """Say how a process ended, in billiard's words, which tools look for."""
    if code is None:
        return "Worker exited prematurely: it closed its socket."
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        return f"Worker exited prematurely: signal {-code} ({name})"
    return f"Worker exited prematurely: exitcode {code}"


def _environment(shown: Sequence[devices.Device]) -> dict[str, str]:
    """As this process's; where a replica has devices, it sees them and no others."""
    environment = {**conf.environment(), **devices.environment(shown)}
    # It makes Celery treat the process as one that billiard spawned, with a copy of the app.
    environment.pop("FORKED_BY_MULTIPROCESSING", None)
    return environment
