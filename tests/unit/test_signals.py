from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery

import gw_celery as gw
from tests.starting import refusal, started


@pytest.fixture
def refused(celery_app: Celery, app: gw.App) -> Celery:
    """An app whose workers cannot start."""
    celery_app.conf["gw_start_timout"] = 3
    return celery_app


def test_a_refused_worker_leaves_its_reason_where_it_would_log(
    refused: Celery, tmp_path: Path
) -> None:
    """Detached, its terminal is gone, and Celery has not set up logging yet."""
    assert "did you mean 'gw_start_timeout'?" in refusal(refused, "celery", folder=tmp_path)


@pytest.mark.parametrize("logfile", [None, "/nowhere/at/all/worker.log", "%n%I.log"])
def test_a_log_that_cannot_be_written_is_no_obstacle(refused: Celery, logfile: str | None) -> None:
    with pytest.raises(SystemExit), started(refused, "celery", logfile=logfile):
        pass
