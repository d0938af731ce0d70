"""A real ``celery worker`` for a test, on an embedded server of its own."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery

from gw_celery import conf, devserver
from gw_celery.testing import connections
from gw_celery.testing.processes import READY_TIMEOUT, Process, eventually

#: Seconds that one inspection of a worker waits for its answer.
_ANSWER = 0.5


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
        self._wait(lambda ask: bool(ask("ping")), timeout)

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the worker answers, and on the GPU pool until all its replicas are READY.

        Raises:
            AssertionError: at once when it ends or cannot load, or after ``timeout`` seconds.
        """
        self._wait(lambda ask: self._is_ready(ask("stats")), timeout)

    def replicas(self) -> list[dict[str, Any]]:
        """Return the replicas in ``inspect stats``, up to a second old; none on other pools."""
        with self._asking() as ask:
            return _replicas(ask("stats") or {}) or []

    def _is_ready(self, stats: dict[str, Any] | None) -> bool:
        if stats is None:
            return False
        replicas = _replicas(stats)
        if replicas is None:
            return True
        for replica in replicas:
            if replica["state"] == "failed":
                raise AssertionError(
                    f"replica {replica['number']} of {self} cannot serve: {replica['last_error']}"
                )
        return bool(replicas) and all(replica["state"] == "ready" for replica in replicas)

    def _wait(self, is_over: Callable[[Callable[[str], Any]], bool], timeout: float) -> None:
        with self._asking() as ask:
            eventually(lambda: self.exit_code is not None or is_over(ask), timeout)
        if self.exit_code is not None:
            raise AssertionError(f"{self} ended with {self.exit_code} and never was ready")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Callable[[str], Any]]:
        """A function that inspects this worker alone; ``None`` where it does not answer."""
        # An app publishes commands by this process's variables, whichever URL it is given.
        urls = conf.talking_to(self.broker_url, self.result_url)
        with urls, Celery(set_as_current=False) as app:
            inspect = app.control.inspect([self.node], timeout=_ANSWER, limit=1)

            def ask(command: str) -> Any:
                return (getattr(inspect, command)() or {}).get(self.node)

            yield ask


def _replicas(stats: dict[str, Any]) -> list[dict[str, Any]] | None:
    replicas: list[dict[str, Any]] | None = stats.get("pool", {}).get("gw_replicas")
    return replicas


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
        stack.enter_context(connections.talking_to(server))
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
