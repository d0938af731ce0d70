"""Workers and other processes of the tests, with the checkout and the test apps importable."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gw_celery import testing
from gw_celery.testing import Worker as WorkerProcess
from gw_celery.testing import eventually, is_alive

__all__ = [
    "ROOT",
    "Process",
    "StartWorker",
    "WorkerProcess",
    "environment",
    "eventually",
    "is_alive",
    "logged_at",
    "workers",
]

ROOT = Path(__file__).resolve().parent.parent
IMPORT_PATHS = (ROOT, ROOT / "django_app", ROOT / "tests" / "integration" / "apps")
READY_TIMEOUT = 40.0


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment, with the checkout and the test apps importable."""
    paths = [*map(str, IMPORT_PATHS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


class Process(testing.Process):
    """A command in such an environment."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        **where: Any,
    ) -> None:
        super().__init__(command, log, env=environment(env), **where)


def logged_at(worker: WorkerProcess, text: str) -> float:
    """When the last line with ``text`` was written to a worker's log, in seconds of this clock."""
    (*_, line) = [one for one in worker.log_text().splitlines(keepends=True) if text in one]
    written = dt.datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f")  # noqa: DTZ007
    return written.timestamp()  # the log, too, is in local time


class StartWorker:
    """Starts workers; ``broker`` and ``result`` are the defaults.

    They reach a worker through Celery's own variables, so that an app module needs no URL in it.
    """

    def __init__(self, log_dir: Path, broker: str, result: str) -> None:
        self._log_dir = log_dir
        self._broker = broker
        self._result = result
        self._started: list[WorkerProcess] = []

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
    ) -> WorkerProcess:
        # Another verb than Celery's own has its own idea of the pool and its size.
        chosen = [] if verb else ["-P", pool, "-c", str(concurrency)]
        options = [*chosen, "-l", "INFO", *extra_args]
        options += ["-Q", queues] if queues else []
        worker = WorkerProcess(
            app_module,
            *options,
            broker_url=broker or self._broker,
            result_url=result or self._result,
            log_dir=self._log_dir,
            command=tuple(verb or ("worker",)),
            env={"PYTHONPATH": environment()["PYTHONPATH"], **(env or {})},
            cwd=self._log_dir,
        )
        self._started.append(worker)
        if wait_ready:
            # A ping before that is lost, and its answer is awaited for up to a second.
            worker.wait_for_log(f"{worker.node} ready.", ready_timeout)
            worker.wait_answer(ready_timeout)
        return worker

    def stop(self) -> None:
        """End all workers, and wait for nothing where nothing can come of it.

        The embedded server is emptied before the next test; the queues of a RabbitMQ are not, and
        an input that returns to them would run there. What is killed reports no coverage.
        """
        is_measured = "COVERAGE_PROCESS_CONFIG" in os.environ
        for worker in reversed(self._started):
            if worker.broker_url.startswith("redis+socket:") and not is_measured:
                worker.kill()
            worker.stop()


@contextmanager
def workers(log_dir: Path, broker: str, result: str) -> Iterator[StartWorker]:
    """Yield what starts workers; stop them all at the end."""
    start_worker = StartWorker(log_dir, broker, result)
    try:
        yield start_worker
    finally:
        start_worker.stop()
