"""When beat starts: its schedule has the sweeps that are needed, and no others of ours."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable
from typing import Any

from celery.beat import PersistentScheduler

from gw_celery.client import beat_tasks
from gw_celery.declare import registry

logger = logging.getLogger(__name__)

_DATABASE = "django_celery_beat.schedulers.DatabaseScheduler"


def settle(service: Any, registries: Iterable[registry.Registry]) -> None:
    """Put right what the scheduler of ``service`` has read; before its first tick.

    It may have read ``beat_schedule`` without our entries, where a project replaced it late. Of
    django-celery-beat the rows that begin as our names do and that nothing declares any more go
    away, and no other row is touched.
    """
    app, scheduler = service.app, service.scheduler
    with contextlib.suppress(KeyError):  # a project that makes no queues is told when it sends
        beat_tasks.queue_of(app)
    beat_tasks.schedule(app, registries)
    ours = beat_tasks.given(app)
    if _is_database(scheduler):
        scheduler.update_from_dict({name: _as_row(entry) for name, entry in ours.items()})
        _remove_stale(scheduler, app.conf.beat_schedule or {})
    elif isinstance(scheduler, PersistentScheduler):
        missing = {name: ours[name] for name in ours if name not in scheduler.schedule}
        scheduler.update_from_dict(missing)


def _is_database(scheduler: Any) -> bool:
    """Told by its name: only a project that uses it has it installed."""
    return any(f"{one.__module__}.{one.__qualname__}" == _DATABASE for one in type(scheduler).mro())


def _as_row(entry: dict[str, Any]) -> dict[str, Any]:
    """Return ``entry`` as a row can hold it: whole seconds, and its own word for ``expires``."""
    period = max(1, math.floor(entry["schedule"]))
    options = {"queue": entry["options"]["queue"], "expire_seconds": period}
    return {**entry, "schedule": period, "options": options}


def _remove_stale(scheduler: Any, declared: Iterable[str]) -> None:
    rows = scheduler.Model._default_manager
    kept = set(declared)
    # Asked again in Python: the LIKE of some databases takes GW_CELERY for the same.
    for row in rows.filter(name__startswith=beat_tasks.PREFIX):
        if row.name.startswith(beat_tasks.PREFIX) and row.name not in kept:
            logger.warning("the periodic task %s is removed: nothing declares it", row.name)
            scheduler.schedule.pop(row.name, None)
            row.delete()
