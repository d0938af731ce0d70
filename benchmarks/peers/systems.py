"""What is compared: how each system is installed, started, asked and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from benchmarks.peers import venvs, workloads

ROOT = Path(__file__).parents[2]
STOP_TIMEOUT = 10.0
_QUIET = ["--without-mingle", "--without-gossip", "-l", "WARNING"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A worker or server, and how the client speaks to it."""

    name: str
    title: str
    #: What follows ``python -m``; gets the workload and a free port.
    command: Callable[[workloads.Workload, int], list[str]]
    #: The module with the task that the client sends; empty for HTTP.
    client: str = ""
    #: What pip installs into an environment of its own; none: this one.
    requirements: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def interpreter(self) -> Path:
        """Install what is missing.

        Raises:
            Unavailable: with the reason.
        """
        if not self.requirements:
            return Path(sys.executable)
        return venvs.python(self.name, self.requirements)


def _celery(module: str, *options: str) -> list[str]:
    # No -b: the URLs are in the environment, for the client as well.
    return ["celery", "-A", f"benchmarks.peers.{module}:celery", "worker", *_QUIET, *options]


def _ours(workload: workloads.Workload, _: int) -> list[str]:
    queue = f"cpu.{'Service' if workload.has_model else workload.name}"
    slots = 2 * workload.max_batch if workload.has_model else 64
    return _celery("ours", "-Q", queue, "-c", str(slots))


def _threads(workload: workloads.Workload, _: int) -> list[str]:
    # As many inputs as ours holds: one batch runs while the next one gathers.
    threads = 2 * workload.max_batch if workload.has_model else 64
    return _celery("stock", "-P", "threads", "-c", str(threads))


def _bento(_: workloads.Workload, port: int) -> list[str]:
    target = ["benchmarks.peers.bento:Service", "--working-dir", str(ROOT)]
    return ["bentoml", "serve", *target, "--host", "127.0.0.1", "--port", str(port)]


SYSTEMS = {
    one.name: one
    for one in (
        System(name="ours", title="GPU pool, one replica", command=_ours, client="ours"),
        System(
            name="prefork",
            title="stock prefork, -c 2",
            command=lambda *_: _celery("stock", "-P", "prefork", "-c", "2"),
            client="stock",
            env={"PEERS_POOL": "prefork"},
        ),
        System(
            name="threads",
            title="stock threads and a batcher",
            command=_threads,
            client="stock",
            env={"PEERS_POOL": "threads"},
        ),
        System(
            name="celery-batches",
            title="celery-batches, -c 1",
            command=lambda *_: _celery("batches", "-P", "prefork", "-c", "1"),
            client="stock",
            requirements=("celery-batches==0.11", "celery[redis]>=5.6,<5.7"),
        ),
        System(
            name="litserve",
            title="LitServe (HTTP)",
            command=lambda _, port: ["benchmarks.peers.lit", str(port)],
            requirements=("litserve==0.2.19",),
        ),
        System(
            name="bentoml",
            title="BentoML (HTTP)",
            command=_bento,
            requirements=("bentoml==1.4.39",),
            env={"BENTOML_DO_NOT_TRACK": "True"},
        ),
    )
}


@contextlib.contextmanager
def started(
    system: System, workload: workloads.Workload, env: Mapping[str, str], log: Path
) -> Iterator[tuple[int, int]]:
    """Run a system for the length of a ``with`` block; yields its pid, and its port over HTTP.

    It is not awaited: the client sees when it answers.
    """
    port = _free_port()
    command = [str(system.interpreter()), "-m", *system.command(workload, port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**env, **system.env},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process.pid, port
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """TERM; after ``STOP_TIMEOUT`` KILL, with what it had started: inputs are still in flight."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *children], STOP_TIMEOUT)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(STOP_TIMEOUT)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
