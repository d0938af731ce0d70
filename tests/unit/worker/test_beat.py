"""What beat holds once it has started; rows of a database are in the integration tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.beat import Service
from celery.signals import beat_init

import gw_celery as gw
from gw_celery.client import beat_tasks

MAIL = {"mail": {"task": "mail", "schedule": 60.0}}


@contextlib.contextmanager
def started(app: Celery, path: Path) -> Iterator[Any]:
    """The scheduler of a beat that has started, up to its first tick."""
    service = Service(app, schedule_filename=str(path))
    try:
        yield service.scheduler
    finally:
        service.scheduler.close()


@pytest.fixture
def scheduled(tmp_path: Path) -> Callable[[Celery], list[str]]:
    """What the file of a beat, the same one over restarts, holds after a start."""

    def start(app: Celery) -> list[str]:
        app.finalize()
        service = Service(app, schedule_filename=str(tmp_path / "schedule"))
        try:
            _ = service.scheduler  # beat reads its schedule before it tells us
            beat_init.send(sender=service)
            return sorted(one for one in service.scheduler.schedule if "backend" not in one)
        finally:
            service.scheduler.close()

    return start


def probing(*, has_probe: bool = True, **settings: Any) -> Celery:
    made = Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
    made.conf.update(settings)
    app = gw.App("unit", made)
    probes = [gw.Probe.on("check")] if has_probe else []
    app.cls(probes=probes)(type("Model", (), {"check": gw.method()(check), "__module__": "m"}))
    return made


def check(self) -> bool: ...


@pytest.mark.parametrize("later", [{"has_probe": False}, {"gw_probe_period": None}])
def test_an_entry_that_is_needed_no_more_leaves_the_file(
    scheduled: Callable[[Celery], list[str]], later: dict[str, Any]
) -> None:
    assert scheduled(probing(beat_schedule=MAIL)) == [beat_tasks.PROBE, "mail"]
    assert scheduled(probing(beat_schedule=MAIL)) == [beat_tasks.PROBE, "mail"]
    assert scheduled(probing(beat_schedule=MAIL, **later)) == ["mail"]


def test_a_changed_period_replaces_the_one_in_the_file(
    scheduled: Callable[[Celery], list[str]], tmp_path: Path
) -> None:
    scheduled(probing())
    app = probing(gw_probe_period=5.0)
    scheduled(app)
    with started(app, tmp_path / "schedule") as scheduler:
        assert scheduler.schedule[beat_tasks.PROBE].schedule.seconds == 5.0


def test_a_schedule_that_a_project_replaced_late_is_completed(
    scheduled: Callable[[Celery], list[str]],
) -> None:
    app = probing()
    app.finalize()
    app.conf.beat_schedule = MAIL
    assert scheduled(app) == [beat_tasks.PROBE, "mail"]
