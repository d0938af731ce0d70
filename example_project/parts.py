"""The processes that make up the demo: started with a log, watched, stopped together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TAIL_LINES = 20
POLL = 0.2
PR_SET_PDEATHSIG = 1
#: How many ports are tried. They stay below those that the system gives to outgoing connections.
PORTS = 100


class PartFailed(Exception):
    """Raised when a part ends before it should; carries the end of its log."""


class Part:
    """One ``python -m ...`` of the demo, with its output in a file."""

    def __init__(
        self,
        name: str,
        logs: Path,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._env = env or {}
        self.log = logs / f"{name}.log"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, env: Mapping[str, str]) -> None:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments],
                cwd=HERE,
                env={**env, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal is for demo.py alone, which stops the parts in order.
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - demo.py has one thread
            )

    def check(self) -> None:
        """Raise PartFailed when the process has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise PartFailed(f"{self.name} ended with code {code}; {self.tail()}")

    def finish(self) -> None:
        """Wait for a part that ends by itself."""
        if self._process is not None and (code := self._process.wait()):
            raise PartFailed(f"{self.name} failed with code {code}; {self.tail()}")

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n  ".join((f"the end of {self.log}:", *lines))

    def request_stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, deadline: float) -> None:
        """Wait until ``deadline`` for the process to end, then end it with its children."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _end_with_parent() -> None:
    # Should demo.py be killed, nothing is left behind: Linux tells its children.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_all(parts: Sequence[Part], timeout: float) -> None:
    """Ask all parts to stop at once, and give them ``timeout`` seconds together."""
    deadline = time.monotonic() + timeout
    for part in parts:
        part.request_stop()
    for part in parts:
        part.stop(deadline)


class Ending:
    """Ctrl-C, TERM or a closed terminal: the first raises KeyboardInterrupt, others do nothing."""

    def __init__(self) -> None:
        self._is_asked = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self._is_asked:
            self._is_asked = True
            raise KeyboardInterrupt

    def check(self) -> None:
        # Python drops what a signal raises inside a destructor or a hook of fork: raise it again.
        if self._is_asked:
            raise KeyboardInterrupt


def wait_until(
    ask: Callable[[], object], check: Callable[[], None], suspect: Part, timeout: float
) -> None:
    """Ask until the answer is truthy; ``check`` may end the wait; ``suspect`` is to blame."""
    deadline = time.monotonic() + timeout
    while not ask():
        check()
        if time.monotonic() > deadline:
            raise PartFailed(f"{suspect.name} not ready in {timeout:.0f} s; {suspect.tail()}")
        time.sleep(POLL)


@contextlib.contextmanager
def claimed_port(preferred: int) -> Iterator[int]:
    """Keep ``preferred``, or a port soon after it, from all other demos until the end.

    A part binds its port seconds after it was found free. So the UDP port of the same number is
    taken too, which no part needs: other demos see that, and it is gone when the process is.
    """
    for port in range(preferred, preferred + PORTS):
        with socket.socket(type=socket.SOCK_DGRAM) as claim, socket.socket() as probe:
            # Without it, connections of a server that has ended keep its port for a minute.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                claim.bind(("127.0.0.1", port))
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            probe.close()
            yield port
            return
    last = preferred + PORTS - 1
    raise PartFailed(f"no port of 127.0.0.1 from {preferred} to {last} is free: stop another demo")
