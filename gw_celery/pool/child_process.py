"""One child process: how it is started, written to, read from, and ended."""

from __future__ import annotations

import collections
import dataclasses
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gw_celery import conf
from gw_celery.gpus import devices
from gw_celery.policy import probes
from gw_celery.pool import child_state, dispatch
from gw_celery.protocol import frames

_READ_BYTES = 256 * 1024
#: A process that closed its socket, or was killed, is a moment from its end.
_REAP = 0.1


@dataclasses.dataclass(frozen=True)
class Received:
    """What one reading of a child's socket gave."""

    reports: Sequence[list[Any]] = ()
    #: The child has closed its end.
    is_closed: bool = False
    #: After the reports came bytes that no child of this version writes.
    garbage: frames.Garbage | None = None


class Child:
    """A process and the parent's end of the socket that joins them; nothing here blocks."""

    def __init__(
        self,
        number: int,
        life: child_state.Life,
        slots: Mapping[str, int],
        share: Sequence[devices.Device] = (),
    ) -> None:
        #: Number of the replica that it fills.
        self.number = number
        self.life = life
        self.room = dispatch.Room(slots)
        #: The GPUs that it runs on, as their maker calls them.
        self.products = tuple(one.name for one in share)
        #: What it holds, by job number, answered or not.
        self.jobs: dict[int, Any] = {}
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
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._unpacker = frames.Unpacker(frames.MAX_CHILD_FRAME_BYTES)
        self._outgoing: collections.deque[memoryview] = collections.deque()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gw_celery.replica.boot", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(share),
                stdin=subprocess.DEVNULL,
            )

    def __repr__(self) -> str:
        return f"replica {self.number} (pid {self.pid})"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outgoing)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send_first(self, setup: dict[str, Any]) -> None:
        """Write the frame by which the child learns what to load; it has no ``Order``."""
        self.send((setup | {"version": frames.version()},))

    def send(self, *orders: tuple[Any, ...]) -> None:
        """Write orders, keeping what the socket does not take now; errors show when reading."""
        self._outgoing.append(memoryview(frames.pack_orders(orders)))
        self.flush()

    def flush(self) -> None:
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing[0])
                if sent == len(self._outgoing[0]):
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = self._outgoing[0][sent:]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._outgoing.clear()

    def receive(self) -> Received:
        """Return what is there; reports before garbage count."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return Received()
        except OSError:
            return Received(is_closed=True)
        reports: list[list[Any]] = []
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
        self._socket.close()
        try:
            return self.process.wait(_REAP)
        except subprocess.TimeoutExpired:
            return None


def reap(processes: list[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """Return those that have not ended yet; the others leave no zombie."""
    return [one for one in processes if one.poll() is None]


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


def _environment(share: Sequence[devices.Device]) -> dict[str, str]:
    """As this process's; where a replica has devices, it sees them and no others."""
    environment = {**conf.environment(), **devices.environment(share)}
    # It makes Celery treat the process as one that billiard spawned, with a copy of the app.
    environment.pop("FORKED_BY_MULTIPROCESSING", None)
    return environment
