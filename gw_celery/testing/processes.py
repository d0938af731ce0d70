"""Real processes: started with a log file, awaited by polling, always stopped."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from gw_celery import conf

STOP_TIMEOUT = 15.0
READY_TIMEOUT = 40.0

T = TypeVar("T")

#: Processes now running: the pytest plugin adds the ends of their logs to a failed test's report.
running: list[Process] = []


def eventually(ask: Callable[[], T], timeout: float = 10.0, interval: float = 0.05) -> T:
    """Return the first truthy answer of ``ask``.

    Args:
        ask: called until its answer is truthy.
        timeout: seconds.
        interval: seconds between two calls.

    Raises:
        AssertionError: when ``timeout`` seconds pass without one.
    """
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {answer!r} after {timeout} s: {ask}")
        time.sleep(interval)
    return answer


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not (some containers' init reaps no orphan)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Process:
    """A command in a session of its own.

    Args:
        command: the program and its arguments.
        log: file that its output is appended to.
        env: variables beside those of this process.
        cwd: where it runs; the folder of its log by default.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**conf.environment(), "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=cwd or log.parent,
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self._descendants: set[psutil.Process] = set()
        running.append(self)

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs; negative for the signal that ended it."""
        return self._popen.poll()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_for_log(self, text: str, timeout: float = READY_TIMEOUT, times: int = 1) -> None:
        """Wait until the log has ``text``.

        Args:
            text: words of one line.
            timeout: seconds.
            times: how often the log has to have it.

        Raises:
            AssertionError: at once when the process ends without it, or after ``timeout`` seconds.
        """

        def is_logged() -> bool:
            return self.log_text().count(text) >= times

        eventually(lambda: self.exit_code is not None or is_logged(), timeout)
        if not is_logged():
            raise AssertionError(f"{self} ended without {text!r} in its log:\n{self.log_tail()}")

    def children(self) -> list[int]:
        """Return the pids of all live descendants, oldest first."""
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._descendants.update(children)
        return [child.pid for child in children if is_alive(child.pid)]

    def signal(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            self._popen.send_signal(number)

    def wait_exit(self, timeout: float = STOP_TIMEOUT) -> int:
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self} still runs after {timeout} s:\n{self.log_tail()}"
            ) from None

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Send TERM, and after ``timeout`` seconds KILL; KILL what is left of its descendants.

        Returns:
            The exit code, negative for the signal that ended it.
        """
        self.children()
        self.signal(signal.SIGTERM)
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        for descendant in self._descendants:
            # psutil compares start times, so that a reused pid is never hit.
            if descendant.is_running():
                descendant.kill()
        if self in running:
            running.remove(self)
        return self._popen.wait()

    def kill(self) -> None:
        """Send KILL at once, as the kernel's out-of-memory killer would."""
        self.children()
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid} {' '.join(self.command[1:])}>"
