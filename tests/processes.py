"""Real processes for the tests: started with a log file, awaited by asking, always stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar
from unittest import mock
from uuid import uuid4

import psutil
from celery import Celery

ROOT = Path(__file__).resolve().parent.parent
IMPORT_PATHS = (ROOT, ROOT / "django_app", ROOT / "tests" / "integration" / "apps")
STOP_TIMEOUT = 15.0
READY_TIMEOUT = 40.0

T = TypeVar("T")

#: Processes now running: conftest adds the tails of their logs to the report of a failed test.
running: list[Process] = []


def eventually(ask: Callable[[], T], timeout: float = 10.0, interval: float = 0.05) -> T:
    """Return the first truthy answer of ``ask``; fail when ``timeout`` passes without one."""
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {answer!r} after {timeout} s: {ask}")
        time.sleep(interval)
    return answer


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not (some containers' init reaps no orphan)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment, with the checkout and the test apps importable."""
    paths = [*map(str, IMPORT_PATHS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


class Process:
    """A command of its own session, its output in a file."""

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
                env=environment(env),
                cwd=cwd or log.parent,
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self._family: set[psutil.Process] = set()
        running.append(self)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._popen.poll()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_for_log(self, text: str, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the log has ``text``; fail at once when the process ends without it."""

        def said_or_ended() -> bool:
            return text in self.log_text() or self.exit_code is not None

        eventually(said_or_ended, timeout)
        if text not in self.log_text():
            raise AssertionError(f"{self} ended without {text!r} in its log:\n{self.log_tail()}")

    def children(self) -> list[int]:
        """Pids of all live descendants, oldest first."""
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._family.update(found)
        return [child.pid for child in found if is_alive(child.pid)]

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
        """TERM, and KILL with all its descendants if that is not enough; the exit code."""
        self.children()
        self.signal(signal.SIGTERM)
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        self._kill_orphans()
        if self in running:
            running.remove(self)
        return self._popen.wait()

    def kill(self) -> None:
        """KILL it at once, as the kernel's out-of-memory killer would."""
        self.children()
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def _kill_orphans(self) -> None:
        for child in self._family:
            # psutil compares start times, so that a reused pid is never hit.
            if child.is_running():
                child.kill()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid} {' '.join(self.command[1:])}>"


class WorkerProcess(Process):
    """A ``celery worker`` that other code can wait for."""

    def __init__(
        self, node: str, broker: str, command: Sequence[str], log: Path, env: Mapping[str, str]
    ) -> None:
        super().__init__(command, log, env=env)
        self.node = node
        self.broker = broker

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the worker answers a ping; fail at once when it ends before."""
        # An app reads this variable before the URL that it is given.
        url = {"CELERY_BROKER_URL": self.broker}
        with mock.patch.dict(os.environ, url), Celery(set_as_current=False) as app:
            eventually(lambda: self.exit_code is not None or self._pings(app), timeout, 0)
        if self.exit_code is not None:
            raise AssertionError(f"{self} ended with {self.exit_code}:\n{self.log_tail()}")

    def _pings(self, app: Celery) -> bool:
        return bool(app.control.ping(destination=[self.node], timeout=0.3, limit=1))


class StartWorker(Protocol):
    def __call__(
        self,
        app_module: str,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        queues: str | None = "cpu",
        broker: str | None = None,
        result: str | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        wait_ready: bool = True,
        ready_timeout: float = READY_TIMEOUT,
        verb: Sequence[str] | None = None,
    ) -> WorkerProcess: ...


@contextmanager
def workers(log_dir: Path, broker: str, result: str) -> Iterator[StartWorker]:
    """Yield a function that starts workers; stop them all at the end.

    ``broker`` and ``result`` are the defaults; they reach the worker through Celery's own
    variables, so that an app module needs no URL in it.
    """
    started: list[WorkerProcess] = []
    defaults = {"broker": broker, "result": result}

    def start_worker(
        app_module: str,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        queues: str | None = "cpu",
        broker: str | None = None,
        result: str | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        wait_ready: bool = True,
        ready_timeout: float = READY_TIMEOUT,
        verb: Sequence[str] | None = None,
    ) -> WorkerProcess:
        node = f"w{len(started)}-{uuid4().hex[:8]}@test"
        urls = {
            "CELERY_BROKER_URL": broker or defaults["broker"],
            "CELERY_RESULT_BACKEND": result or defaults["result"],
        }
        # Another verb than Celery's own has its own idea of the pool and its size.
        verb = verb or ["worker", "-P", pool, "-c", str(concurrency)]
        command = [sys.executable, "-m", "celery", "-A", app_module, *verb, "-n", node]
        command += ["-l", "INFO", *extra_args]
        command += ["-Q", queues] if queues else []
        # Each worker would wait a second for the answers of others, and there are none.
        command += ["--without-mingle", "--without-gossip"]
        log = log_dir / f"{node}.log"
        worker = WorkerProcess(
            node, urls["CELERY_BROKER_URL"], command, log, {**urls, **(env or {})}
        )
        started.append(worker)
        if wait_ready:
            worker.wait_ready(ready_timeout)
        return worker

    try:
        yield start_worker
    finally:
        for worker in reversed(started):
            worker.stop()
