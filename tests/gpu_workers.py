"""A worker of ``celery gw worker`` on a machine with other GPUs than this one, in this process.

Celery's own command makes the worker, which decides what it serves on which devices as any other
does; its children are noted, and never run. What GPUs the machine has is said as users say it, by
``GW_FAKE_GPUS`` and ``CUDA_VISIBLE_DEVICES``, or by what NVML answers (``Nvml``)::

    def test_a_replica_gets_a_device(gpu_worker):
        worker = gpu_worker("", [gw.Gpu("A100")], "A100:2")
        assert worker.replicas == [["GPU-fake-0"], ["GPU-fake-1"]]
"""

from __future__ import annotations

import importlib.metadata
import itertools
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from celery import Celery, _state
from celery.worker import control
from click.testing import CliRunner

import gw_celery as gw
from gw_celery import signals as plan_holder
from tests.pool_harness import _Process as FakeProcess

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: The exit code of a worker whose configuration cannot work.
REFUSED = 78
_numbers = itertools.count(1)
#: The app of the worker whose children are started now.
celery_app: Celery | None = None


class Worker:
    """What a user sees of a worker that was started, or refused."""

    def __init__(self, app: _App, code: int, said: str) -> None:
        self._app = app
        #: Of the command.
        self.code = code
        #: What it wrote into the log.
        self.said = said

    @property
    def is_refused(self) -> bool:
        return self.code == REFUSED

    @property
    def queues(self) -> list[str]:
        return sorted(self._app.amqp.queues.consume_from)

    @property
    def families(self) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in self.queues})

    @property
    def slots(self) -> int:
        assert self._app.worker is not None, self.said
        return int(self._app.worker.concurrency)

    def environments(self) -> list[dict[str, str]]:
        """The environment that the child of each replica gets."""
        assert self._app.worker is not None, self.said
        started: list[FakeProcess] = []

        def popen(command: Any, **options: Any) -> FakeProcess:
            started.append(FakeProcess(command, **options))
            return started[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", popen)
            # A child could import it from here.
            patch.setattr(sys.modules[__name__], "celery_app", self._app)
            pool = self._app.worker.pool
            pool.start()
            pool.terminate()
        return [process.options["env"] for process in started]

    @property
    def replicas(self) -> list[list[str]]:
        """The devices of each replica, by their tokens."""
        return [environment[VISIBLE].split(",") for environment in self.environments()]


class _App(Celery):
    """An app whose command makes a worker and does not run it."""

    worker: Any = None

    @property
    def Worker(self) -> Any:  # noqa: N802
        def make(**options: Any) -> Any:
            self.worker = self.WorkController(**options)
            return types.SimpleNamespace(start=lambda: None, exitcode=0)

        return make


class GpuWorkers:
    """Starts workers, each with an app of its own."""

    def __init__(self, patch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
        self._patch = patch
        self._log = log

    def __call__(
        self,
        line: str,
        declared: Sequence[gw.Gpu | None],
        machine: str | Nvml | None,
        *,
        visible: str | None = None,
        **settings: Any,
    ) -> Worker:
        """Return the worker of ``celery gw worker LINE``.

        Args:
            line: further options.
            declared: the GPU of each service.
            machine: the value of ``GW_FAKE_GPUS``, or what NVML answers; ``None`` where the library
                is not installed.
            visible: the value of ``CUDA_VISIBLE_DEVICES``.
            settings: without their ``gw_``.
        """
        is_fake = isinstance(machine, str)
        for name, value in (("GW_FAKE_GPUS", machine if is_fake else None), (VISIBLE, visible)):
            if value is None:
                self._patch.delenv(name, raising=False)
            else:
                self._patch.setenv(name, str(value))
        self._patch.setitem(sys.modules, "pynvml", None if is_fake else machine)
        app = _App("gpus", broker="memory://", backend="cache+memory://", set_as_current=False)
        gw.preset(app)
        app.conf.update({f"gw_{name}": value for name, value in settings.items()})
        app.conf.worker_hijack_root_logger = False
        declarations = gw.App("gpus", celery=app)
        for kind in declared:
            _declare(declarations, kind)
        app.finalize()
        (command,) = importlib.metadata.entry_points(group="celery.commands", name="gw")
        about = types.SimpleNamespace(app=app, no_color=True, quiet=True)
        self._log.clear()
        ended = CliRunner().invoke(command.load(), ["worker", *line.split()], obj=about)
        return Worker(app, ended.exit_code, ended.output + self._log.text)


@pytest.fixture
def gpu_worker(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> GpuWorkers:
    for name in ("data", "meta"):
        monkeypatch.setattr(control.Panel, name, dict(getattr(control.Panel, name)))
    monkeypatch.setattr(plan_holder, "_plan", None)
    # A worker that is made says so of its whole process.
    monkeypatch.setattr(_state, "_task_join_will_block", False)
    return GpuWorkers(monkeypatch, caplog)


def _declare(app: gw.App, kind: gw.Gpu | None) -> None:
    async def body(x): ...

    body.__name__ = body.__qualname__ = f"service{next(_numbers)}"
    app.remote(gpu=kind)(body)


# -- NVML --


class NVMLError(Exception):
    """What the library raises for everything."""


class Nvml:
    """The library of a machine with these GPUs; a value that is an error is raised."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVMLError = NVMLError

    def __init__(self, *gpus: Mapping[str, Any], init: Exception | None = None) -> None:
        self.gpus = gpus
        self.init = init
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init is not None:
            raise self.init
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self.is_open
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return told(self.gpus[index], "handle", self.gpus[index])

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return str(told(handle, "name"))

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return str(told(handle, "uuid", NVMLError("Not Supported")))

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return types.SimpleNamespace(total=told(handle, "memory", NVMLError("Not Supported")))

    def nvmlDeviceGetMigMode(self, handle: Any) -> Any:  # noqa: N802
        return (told(handle, "mig", NVMLError("Not Supported")), 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, number: int) -> Any:  # noqa: N802
        if number >= len(handle["slices"]):
            raise NVMLError("Not Found")
        return handle["slices"][number]


def told(handle: Mapping[str, Any], name: str, otherwise: Any = None) -> Any:
    value = handle.get(name, otherwise)
    if isinstance(value, Exception):
        raise value
    return value
