"""Serving on Celery's prefork and solo pools: loading in their processes, and reporting failures.

The functions run in those processes; ``ServingStep`` runs in the worker's parent. These pools learn
of a child only after it has loaded, and cannot stop it before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from celery import bootsteps
from celery.worker import state

from gw_celery import errors, signals
from gw_celery.client import execution
from gw_celery.runtime import in_process, lifecycle
from gw_celery.worker.plan import Plan, log_notices

logger = logging.getLogger(__name__)

#: The device that CUDA needs. NVML, which is safe across forks, opens other devices only.
_CUDA_DEVICE = "/dev/nvidia-uvm"
#: The second is true in a fork of a process in which the first is true.
_QUESTIONS = ("is_initialized", "_is_in_bad_fork")


def load_or_exit(plan: Plan, pipes: Pipes) -> None:
    """Enter everything that ``plan`` serves in this process, before its first task.

    Raises:
        SystemExit: if loading fails (the worker then learns the reason and stops), or if the
            process must give up. What has entered is exited first.
    """
    with lifecycle.fatal_errors(pipes.report), pipes.stop_check() as check:
        if plan.pool == "prefork":
            refuse_cuda()
        runtime = in_process.LocalRuntime(plan.settings, enforces_limits=plan.pool != "prefork")
        runtime.start()
        execution.install(runtime)
        names = ", ".join(service.name for service in plan.served)
        logger.info("pid %d loads %s", runtime.pid, names)
        try:
            runtime.enter(plan.registries, plan.served, check)
            check()
        except BaseException:
            execution.stop()
            raise
        logger.info("pid %d has loaded %d services", runtime.pid, len(plan.served))


def refuse_cuda() -> None:
    """Check that CUDA is not initialized here or in the process that forked this one.

    CUDA fails or hangs in every fork of a process that has initialized it. CPython only prints an
    exception of a hook of ``os.register_at_fork``. Therefore this check runs where it can end a
    process: in the parent before the pool exists, and in each child before it loads. It imports
    nothing.

    Raises:
        ConfigurationError: with the evidence and the remedies.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    signs = [
        f"torch.cuda.{question}() is true"
        for question in _QUESTIONS
        if getattr(cuda, question, bool)()
    ]
    with contextlib.suppress(OSError):  # there is no /proc
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                file = os.readlink(f"/proc/self/fd/{number}")
                signs += [f"{file} is open"] * file.startswith(_CUDA_DEVICE)
    if signs:
        raise errors.ConfigurationError(
            f"CUDA is up in the worker's main process ({signs[0]}), and works in no fork of it: do "
            f"not touch CUDA when modules are imported, load in a context or @gw.on_enter(); or "
            f"start this worker with the GPU pool, which does not fork (CELERY_CUSTOM_WORKER_POOL="
            f"gw_celery.pool:TaskPool and -P custom)"
        )


class Pipes:
    """Pipes made before the fork: children report failed loads, and the worker reports its stop."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._stop_reader, self._stop_writer = os.pipe()

    def report(self, reason: str) -> None:
        """Tell the worker why this child cannot serve, shortened to fit one write."""
        os.write(self._writer, (json.dumps([os.getpid(), errors.cut(reason)]) + "\n").encode())

    def fileno(self) -> int:
        """Return the descriptor that is readable when a child has reported a failure."""
        return self._reader

    def never_wait(self) -> None:
        """Make ``failures`` return at once from now on."""
        os.set_blocking(self._reader, False)

    def failures(self) -> list[tuple[int, str]]:
        """Return the pids and reasons that children have reported; wait for the first."""
        try:
            written = os.read(self._reader, 65536)
        except BlockingIOError:
            return []
        return [tuple(json.loads(line)) for line in written.splitlines()]

    def stop(self) -> None:
        os.write(self._stop_writer, b"!")

    @contextlib.contextmanager
    def stop_check(self) -> Iterator[Callable[[], None]]:
        """Yield a function that raises ``SystemExit`` when the worker stops or SIGTERM arrives.

        SIGTERM's default action would end the process without exiting what it has entered.
        """
        has_signal = threading.Event()
        is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if is_ours:
            signal.signal(signal.SIGTERM, lambda number, frame: has_signal.set())

        def check() -> None:
            # The byte is never read, so that all children see it.
            poll = select.poll()
            poll.register(self._stop_reader, select.POLLIN)
            if has_signal.is_set() or poll.poll(0):
                logger.warning("pid %d was told to stop, and ends its load", os.getpid())
                raise SystemExit(0)

        try:
            yield check
        finally:
            if is_ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


class ServingStep(bootsteps.StartStopStep):
    """The bootstep of prefork and solo: notices in the log, and services in ``inspect stats``.

    It tells loading children when their worker stops, and stops the worker when one cannot load.
    """

    requires = ("celery.worker.components:Hub", "celery.worker.components:Pool")

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._plan = cast(Plan, signals.plan())  # ``worker_init`` runs before the steps exist
        self._pipes = self._plan.pipes

    def info(self, worker: Any) -> dict[str, Any]:
        served = {service.name: service.queue for service in self._plan.served}
        return {"gw_celery": {"pool": self._plan.pool, "serves": served}}

    def start(self, worker: Any) -> None:
        # Not earlier, because Celery sets up logging after ``worker_init``.
        log_notices(worker.app, self._plan)
        if self._pipes is not None and not worker.use_eventloop:
            reading = (worker, self._pipes)
            threading.Thread(
                target=self._read, args=reading, name="gw-failures", daemon=True
            ).start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        if self._pipes is not None:
            self._pipes.never_wait()
            hub.add_reader(self._pipes.fileno(), self._read, worker, self._pipes)

    def stop(self, worker: Any) -> None:
        if self._pipes is not None:
            self._pipes.stop()  # before the pool stops, which waits for its children
            self._pipes.never_wait()
            self._read(worker, self._pipes)

    def _read(self, worker: Any, pipes: Pipes) -> None:
        """Stop the worker if a child has reported why it cannot load."""
        for failure in pipes.failures():
            logger.critical(
                "child pid %d could not load, so this worker stops and its messages stay in the "
                "broker: %s",
                *failure,
            )
            worker.exitcode = state.should_stop = lifecycle.EX_FAILURE
