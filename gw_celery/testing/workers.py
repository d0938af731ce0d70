"""Starts real processes for a test, mainly workers, and closes the connections of its apps."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import psutil
from celery import Celery, _state

from gw_celery import conf, devserver
from gw_celery.client import calls

T = TypeVar("T")

STOP_TIMEOUT = 15.0
READY_TIMEOUT = 40.0
#: Seconds that one inspection of a worker waits for its answer.
_ANSWER = 0.5

#: Running processes; the pytest plugin adds the ends of their logs to the report of a failure.
running: list[Process] = []
#: Broker URL of the server that the apps of this process used last.
_last_url = ""


def eventually(ask: Callable[[], T], timeout: float = 10.0, interval: float = 0.05) -> T:
    """Call ``ask`` until its answer is truthy, and return this answer.

    Args:
        ask: called without arguments.
        timeout: maximum seconds to wait.
        interval: seconds between two calls.

    Raises:
        AssertionError: if no answer is truthy within ``timeout``.
    """
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {answer!r} after {timeout} s: {ask}")
        time.sleep(interval)
    return answer


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie counts as ended: some init processes never reap.

    Args:
        pid: process id.
    """
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Process:
    """A command that runs in its own session.

    Args:
        command: the program and its arguments.
        log: file to which its output is appended.
        env: environment variables in addition to those of this process.
        cwd: working folder; default: the folder of the log.
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
        """The exit code; ``None`` while the process runs, negative after a signal."""
        return self._popen.poll()

    def log_text(self) -> str:
        """Return the whole log."""
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        """Return the last ``lines`` lines of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_for_log(self, text: str, timeout: float = READY_TIMEOUT, times: int = 1) -> None:
        """Wait until the log contains ``text``.

        Args:
            text: part of a line.
            timeout: maximum seconds to wait.
            times: required number of occurrences.

        Raises:
            AssertionError: if ``text`` is missing after ``timeout`` seconds, or when the process
                ends.
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
        """Send a signal, unless the process has ended."""
        if self.exit_code is None:
            self._popen.send_signal(number)

    def wait_exit(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait for the end of the process, and return its exit code, negative after a signal.

        Args:
            timeout: maximum seconds to wait.

        Raises:
            AssertionError: if the process still runs after ``timeout`` seconds.
        """
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self} still runs after {timeout} s:\n{self.log_tail()}"
            ) from None

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Send TERM, and KILL if the process runs on; then send KILL to the live descendants.

        Args:
            timeout: seconds to wait after TERM.

        Returns:
            The exit code; negative after a signal.
        """
        self.children()
        self.signal(signal.SIGTERM)
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        for descendant in self._descendants:
            # psutil compares start times, so that a process with a reused pid is safe.
            if descendant.is_running():
                descendant.kill()
        if self in running:
            running.remove(self)
        return self._popen.wait()

    def kill(self) -> None:
        """Send KILL at once, as the out-of-memory killer of the kernel does."""
        self.children()
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid} {' '.join(self.command[1:])}>"


class Worker(Process):
    """A running ``celery -A app worker`` that a test can inspect and wait for.

    The worker can import what this process can import, and has a unique node name. The variables
    ``CELERY_BROKER_URL`` and ``CELERY_RESULT_BACKEND`` give it the URLs instead of the app's.

    Args:
        app: the argument of ``celery -A``.
        options: options of the command.
        broker_url: URL of the broker.
        result_url: URL of the result backend.
        log_dir: folder for its log.
        env: environment variables in addition to those of this process.
        command: the subcommand; ``("gw", "worker")`` runs ``celery gw worker``.
        cwd: working folder; default: that of this process.
    """

    def __init__(
        self,
        app: str,
        *options: str,
        broker_url: str,
        result_url: str,
        log_dir: Path,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = ("worker",),
        cwd: Path | None = None,
    ) -> None:
        self.broker_url = broker_url
        self.result_url = result_url
        self.node = f"w-{uuid4().hex[:8]}@test"
        # Without these options, each worker waits a second for answers of other workers.
        alone = ["-n", self.node, "--without-mingle", "--without-gossip"]
        super().__init__(
            [sys.executable, "-m", "celery", "-A", app, *command, *alone, *options],
            log_dir / f"{self.node}.log",
            env={
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "CELERY_BROKER_URL": broker_url,
                "CELERY_RESULT_BACKEND": result_url,
                **(env or {}),
            },
            cwd=cwd or Path.cwd(),
        )

    def wait_answer(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the worker answers a ping, which does not require READY replicas.

        Args:
            timeout: maximum seconds to wait.

        Raises:
            AssertionError: if it ends, or does not answer in time.
        """
        self._wait("ping", bool, timeout)

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the worker answers and, on the GPU pool, all its replicas are READY.

        Args:
            timeout: maximum seconds to wait.

        Raises:
            AssertionError: if it ends, fails to load, or is not ready in time.
        """

        def is_ready(stats: dict[str, Any] | None) -> bool:
            if stats is None:
                return False
            replicas = stats.get("pool", {}).get("gw_replicas")
            if replicas is None:
                return True
            for replica in replicas:
                if replica["state"] == "failed":
                    number, error = replica["number"], replica["last_error"]
                    raise AssertionError(f"replica {number} of {self} cannot serve: {error}")
            return bool(replicas) and all(replica["state"] == "ready" for replica in replicas)

        self._wait("stats", is_ready, timeout)

    def replicas(self) -> list[dict[str, Any]]:
        """Return the replicas of ``inspect stats``, up to a second old; empty on other pools."""
        stats = self._ask("stats") or {}
        replicas: list[dict[str, Any]] = stats.get("pool", {}).get("gw_replicas") or []
        return replicas

    def _wait(self, command: str, is_over: Callable[[Any], bool], timeout: float) -> None:
        eventually(lambda: self.exit_code is not None or is_over(self._ask(command)), timeout)
        if self.exit_code is not None:
            raise AssertionError(f"{self} ended with {self.exit_code} and never was ready")

    def _ask(self, command: str) -> Any:
        """Inspect this worker only; return ``None`` if it does not answer."""
        # An app publishes commands to the URLs in the environment, even if it has other URLs.
        urls = conf.talking_to(self.broker_url, self.result_url)
        with urls, Celery(set_as_current=False) as app:
            inspect = app.control.inspect([self.node], timeout=_ANSWER, limit=1)
            return (getattr(inspect, command)() or {}).get(self.node)


@contextlib.contextmanager
def worker(
    app: str,
    *options: str,
    server: devserver.Server | None = None,
    log_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = ("worker",),
    timeout: float = READY_TIMEOUT,
) -> Iterator[Worker]:
    """Run a worker until the block ends, and make this process's apps use the worker's server.

    The block begins when the worker is ready; an exception in it gets the end of the log as a note.

    Args:
        app: the argument of ``celery -A``.
        options: options of ``celery worker``, such as ``"-Q", "gpu.A100"``.
        server: the server for broker and results; default: a new embedded server.
        log_dir: folder for the log; by default the log is deleted with the worker.
        env: environment variables in addition to those of this process.
        command: the subcommand; ``("gw", "worker")`` runs ``celery gw worker``.
        timeout: seconds that the worker may take to be ready.

    Raises:
        AssertionError: if the worker is not ready in time.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = server or stack.enter_context(devserver.running(folder / "server"))
        stack.enter_context(talking_to(server))
        process = Worker(
            app,
            *options,
            broker_url=server.broker_url,
            result_url=server.result_url,
            log_dir=log_dir or folder,
            env=env,
            command=command,
        )
        stack.callback(process.stop)
        try:
            process.wait_ready(timeout)
            yield process
        except BaseException as error:
            error.add_note(f"the end of the log of {process}:\n{process.log_tail()}")
            raise


@contextlib.contextmanager
def talking_to(server: devserver.Server) -> Iterator[None]:
    """Make every Celery app of this process use ``server`` until the block ends.

    Connections to another server are closed first: apps keep them, also in eager mode.
    """
    global _last_url
    with conf.talking_to(server.broker_url, server.result_url):
        if server.broker_url != _last_url:
            _last_url = server.broker_url
            close_all()
        yield


def close_all() -> None:
    """Close the connections of this process's Celery apps, which reconnect when used."""
    calls.close_all()
    for app in list(_state._get_active_apps()):
        with contextlib.suppress(Exception):  # the server may be gone
            close_results(app)
        app._after_fork()  # Celery's own way to abandon connections
        app._local = threading.local()  # holds each thread's result backend


def close_results(app: Any) -> None:
    """Close the connections of this thread's result backend (RPC or Redis)."""
    backend = getattr(app._local, "backend", None)
    consumer: Any = getattr(backend, "result_consumer", None)
    if (connection := getattr(consumer, "_connection", None)) is not None:
        connection.close()
    elif getattr(consumer, "_pubsub", None) is not None:
        consumer.stop()
        # Otherwise, a result that is collected later would open a new connection to unsubscribe.
        consumer._pubsub = None
    if (client := vars(backend).get("client") if backend else None) is not None:
        client.connection_pool.disconnect()
