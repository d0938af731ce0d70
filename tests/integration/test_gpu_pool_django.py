"""A Django project with its results in its database, on the GPU pool."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

import gw_celery as gw
from tests.processes import StartWorker, environment, eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A migrated database of the project."""
    path = tmp_path / "db.sqlite3"
    env = environment({"DATABASE": str(path), "DJANGO_SETTINGS_MODULE": "djangoed"})
    command = [sys.executable, "-m", "django", "migrate", "-v", "0"]
    subprocess.run(command, env=env, check=True, timeout=60)
    return path


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    """A client that only sends: results are read from the database."""
    with Celery("client", broker=redis_url, backend="disabled://", set_as_current=False) as app:
        gw.preset(app)
        yield app


@pytest.fixture
def stored(database: Path, app: Celery) -> Any:
    """Send a task and return what the database says of it, once it is done."""

    def record(task_id: str) -> tuple[str, Any] | None:
        with sqlite3.connect(database, timeout=20) as connection:
            row = connection.execute(
                "select status, result from django_celery_results_taskresult where task_id = ?",
                (task_id,),
            ).fetchone()
        return row if row and row[0] in ("SUCCESS", "FAILURE") else None

    def send(*names: str, **kwargs: Any) -> list[tuple[str, Any]]:
        sent = [app.send_task(f"djangoed.{one}", queue="djangoed", kwargs=kwargs) for one in names]
        found = [eventually(lambda one=one: record(one.id), 30) for one in sent]
        return [(status, json.loads(result)) for status, result in found]

    return send


def test_results_of_every_kind_of_body_are_stored_in_the_projects_database(
    start_worker: StartWorker, database: Path, stored: Any
) -> None:
    env = {"DATABASE": str(database), "DJANGO_SETTINGS_MODULE": "djangoed"}
    worker = start_worker("djangoed:celery", queues="djangoed", env=env)
    tables = ("SUCCESS", len(_tables(database)))
    assert stored("count_tables", "count_tables_plainly") == [tables, tables]
    assert stored(*["count_tables"] * 20, nap=0.05) == [tables] * 20
    ((status, failure),) = stored("fail")
    assert status == "FAILURE"
    assert (failure["exc_type"], failure["exc_message"]) == (
        "LookupError",
        {"~tuple": ["nothing there"]},
    )
    assert "SynchronousOnlyOperation" not in worker.log_text()
    assert "WorkerLostError" not in worker.log_text()


def _tables(database: Path) -> list[str]:
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "select name from sqlite_master where type = 'table' and name not like 'sqlite%'"
        )
        return [name for (name,) in found]
