"""Let a worker of an app start, as far as what it serves and whether it may: ``worker_init``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery import signals as celery_signals
from celery.worker import control

# What a worker decides as it starts is kept for the life of its process.
from gw_celery import signals as plan_holder

POOL = "gw_celery.pool:TaskPool"


class _Worker:
    """Stands for Celery's ``WorkController`` at ``worker_init``."""

    hostname = "w@test"
    concurrency = prefetch_multiplier = 1
    autoscale = autoscaler_cls = None

    def __init__(self, app: Celery, pool: str, logfile: str | None) -> None:
        self.app, self.pool_cls, self.logfile = app, pool, logfile
        self.options: dict[str, Any] = {}


@contextmanager
def started(
    app: Celery, *queues: str, pool: str = POOL, logfile: str | None = None
) -> Iterator[None]:
    """Send what Celery's worker sends before it makes its pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_holder, "_plan", None)
        for name in ("data", "meta"):
            patch.setattr(control.Panel, name, dict(getattr(control.Panel, name)))
        app.amqp.queues.select(queues)
        celery_signals.worker_init.send(sender=_Worker(app, pool, logfile))
        yield


def refusal(app: Celery, *queues: str, folder: Path) -> str:
    """Why a worker of these queues does not start, from the log in ``folder``."""
    log = folder / "worker.log"
    with pytest.raises(SystemExit) as caught, started(app, *queues, logfile=str(log)):
        pass
    assert caught.value.code == 78
    return log.read_text()
