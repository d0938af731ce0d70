"""Real processes for a test, a ``celery worker`` above all, and the connections to its server."""

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

#: Processes now running: the pytest plugin adds the ends of their logs to a failed test's report.
running: list[Process] = []
#: Broker URL of the server that the apps used last.
_last_url = ""


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


class Worker(Process):
    """A running ``celery -A app worker`` that a test can wait for and inspect.

    It imports what this process can import. Its node name and the URLs need not be among the
    options: the URLs reach it through ``CELERY_BROKER_URL`` and ``CELERY_RESULT_BACKEND``, which
    take precedence over the app's own.

    Args:
        app: as for ``celery -A``.
        options: of the command.
        broker_url: of the broker.
        result_url: of the result backend.
        log_dir: the folder of its log.
        env: variables beside those of this process.
        command: ``("gw", "worker")`` is ``celery gw worker``.
        cwd: where it runs; the folder of this process by default.
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
        # Each worker would wait a second for the answers of others, and there are none.
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
        """Wait until the worker answers a ping, whatever it has loaded.

        Raises:
            AssertionError: at once when it ends, or after ``timeout`` seconds.
        """
        self._wait("ping", bool, timeout)

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the worker answers, and on the GPU pool until all its replicas are READY.

        Raises:
            AssertionError: at once when it ends or cannot load, or after ``timeout`` seconds.
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
        """Return the replicas in ``inspect stats``, up to a second old; none on other pools."""
        stats = self._ask("stats") or {}
        replicas: list[dict[str, Any]] = stats.get("pool", {}).get("gw_replicas") or []
        return replicas

    def _wait(self, command: str, is_over: Callable[[Any], bool], timeout: float) -> None:
        eventually(lambda: self.exit_code is not None or is_over(self._ask(command)), timeout)
        if self.exit_code is not None:
            raise AssertionError(f"{self} ended with {self.exit_code} and never was ready")

    def _ask(self, command: str) -> Any:
        """Inspect this worker alone; ``None`` where it does not answer."""
        # An app publishes commands by this process's variables, whichever URL it is given.
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
    """Run a worker that is ready, until the block ends; this process's apps use its server.

    An exception of the block gets the end of the worker's log as a note.

    Args:
        app: as for ``celery -A``.
        options: of ``celery worker``, such as ``"-Q", "gpu.A100"``.
        server: the broker and result backend; an embedded server of its own by default.
        log_dir: where its log is left; by default the log is removed with the worker.
        env: variables beside those of this process.
        command: ``("gw", "worker")`` is ``celery gw worker``.
        timeout: seconds that it has to be ready.

    Raises:
        AssertionError: when it is not ready in time.
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
    """Let every Celery app of this process use ``server`` until the block ends.

    An app keeps its connections, and makes some in eager mode, too: those to other servers are
    forgotten.
    """
    global _last_url
    with conf.talking_to(server.broker_url, server.result_url):
        if server.broker_url != _last_url:
            _last_url = server.broker_url
            close_all()
        yield


def close_all() -> None:
    """Close the connections of the Celery apps of this process, which connect again on use."""
    calls.close_all()
    for app in list(_state._get_active_apps()):
        with contextlib.suppress(Exception):  # the server may be gone
            close_results(app)
        app._after_fork()  # Celery's own way to leave behind connections that are not to be used
        app._local = threading.local()  # where each thread has its result backend


def close_results(app: Any) -> None:
    """Close the connections of this thread's result backend, over RPC or to Redis."""
    backend = getattr(app._local, "backend", None)
    consumer = getattr(backend, "result_consumer", None)
    if (connection := getattr(consumer, "_connection", None)) is not None:
        connection.close()
    elif consumer is not None:
        consumer.stop()
        # A result that is collected later unsubscribes, over another connection if need be.
        consumer._pubsub = None
    if (client := vars(backend).get("client") if backend else None) is not None:
        client.connection_pool.disconnect()
