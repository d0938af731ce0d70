"""A worker at its start, as far as ``worker_init`` and its steps decide: nothing is started.

- ``start(app, "cpu", pool=...)`` sends Celery's ``worker_init`` for a worker of these queues, and
  returns it: its ``concurrency``, ``options`` and classes are as they were decided, and
  ``worker.consumed`` names its queues.
- ``refusal(app, ...)`` is the reason that a worker of these options leaves in its log, and ends.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals
from celery.worker import control
from kombu import compression
from kombu.asynchronous import Hub
from kombu.utils.imports import symbol_by_name

# -- what is known of the inside: a new layout changes these lines and no others --
from gw_celery import signals as plan_holder

GPU_POOL = "gw_celery.pool:TaskPool"


def isolate(patch: pytest.MonkeyPatch) -> None:
    """What a worker makes global at its start, and its declarations, end with the test."""
    patch.setattr(plan_holder, "_registries", [])
    patch.setattr(plan_holder, "_plan", None)
    for name in ("data", "meta"):
        patch.setattr(control.Panel, name, dict(getattr(control.Panel, name)))
    for name in ("_encoders", "_decoders"):
        patch.setattr(compression, name, dict(getattr(compression, name)))


# -- the end of what is known of the inside --


@dataclasses.dataclass(frozen=True)
class Typed:
    """What ``celery gw worker`` has understood of its command line."""

    gpu: str | None = None
    replicas: int | None = None
    names_queues: bool = True


class Worker:
    """Stands for Celery's ``WorkController`` at ``worker_init``."""

    hostname = "gpu@host"
    use_eventloop = True
    exitcode: int | None = None

    def __init__(self, app: Celery, pool: Any, slots: Any, options: dict[str, Any]) -> None:
        self.app = app
        self.pool_cls = pool
        self.concurrency = slots
        self.prefetch_multiplier = options.pop("prefetch_multiplier", 4)
        self.pool_start_method = options.pop("pool_start_method", "fork")
        self.logfile = options.pop("logfile", None)
        self.options = options

    @property
    def consumed(self) -> list[str]:
        return sorted(self.app.amqp.queues.consume_from)

    @property
    def scale(self) -> tuple[int, int] | None:
        """The most and the least slots of a worker that follows its load."""
        return self.options.get("autoscale")

    @property
    def serves(self) -> dict[str, str]:
        """What ``inspect stats`` shows of a worker with one of Celery's pools."""
        shown: dict[str, str] = {}
        for step in self._steps:
            shown |= step.info(self).get("gw_celery", {}).get("serves", {})
        return shown

    def begin(self) -> None:
        """Start the steps of ours that a worker with one of Celery's pools has."""
        for step in self._steps:
            step.start(self)

    def listen(self, hub: Hub) -> None:
        """Its event loop begins, and so do those steps there."""
        for step in self._steps:
            step.register_with_event_loop(self, hub)

    def end(self) -> None:
        for step in self._steps:
            step.stop(self)

    def fits(self, slots: int) -> bool:
        """Whether the GPU pool has devices for so many slots."""
        pool = symbol_by_name(GPU_POOL)(1, initargs=(self.app, self.hostname), app=self.app)
        return pool.refusal(slots) is None

    @functools.cached_property
    def _steps(self) -> list[Any]:
        ours = [step for step in self.app.steps["worker"] if isinstance(step, type)]
        return [step(self) for step in ours if step.__module__.startswith("gw_celery")]


def start(
    app: Celery,
    *queues: str,
    pool: Any = GPU_POOL,
    slots: Any = 1,
    typed: Typed | None = None,
    **options: Any,
) -> Worker:
    """Return a worker after ``worker_init``; ``options`` are those that Celery gives to it.

    Raises:
        SystemExit: where it cannot serve.
    """
    app.amqp.queues.select(queues)
    if typed is not None:
        options["gw_options"] = typed
    worker = Worker(app, pool, slots, options)
    signals.worker_init.send(sender=worker)
    return worker


def refusal(app: Celery, *queues: str, code: int = 78, **options: Any) -> str:
    """Why such a worker does not start; asserts that it does not, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "worker.log")
        with pytest.raises(SystemExit) as caught:
            start(app, *queues, logfile=str(log), **options)
        assert caught.value.code == code
        return log.read_text()
