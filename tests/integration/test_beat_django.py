"""django-celery-beat: the rows of our sweeps, over restarts of a real beat."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from gw_celery import testing
from tests.processes import Process, environment

pytestmark = pytest.mark.integration

PROBE = "gw_celery.probe_sweep"
BENCHMARK = "gw_celery.benchmark_sweep"
QUEUE = "gw.control"
BOTH = [BENCHMARK, PROBE]
Rows = dict[str, dict[str, Any]]
RunBeat = Callable[..., Process]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A migrated database of the project."""
    path = tmp_path / "db.sqlite3"
    run(path, "from django.core.management import call_command; call_command('migrate', '-v0')")
    return path


def run(database: Path, code: str) -> None:
    env = environment({"DATABASE": str(database), "DJANGO_SETTINGS_MODULE": "ticked_django"})
    command = [sys.executable, "-c", f"import django; django.setup()\n{code}"]
    subprocess.run(command, env=env, check=True, timeout=60)


@pytest.fixture
def run_beat(database: Path, redis_url: str, result_url: str, tmp_path: Path) -> RunBeat:
    """Run the project's beat until its first turn is over."""
    logs = iter(range(100))

    def start(until: str = "Waking up", **env: str) -> Process:
        command = [sys.executable, "-m", "celery", "-A", "ticked_django:celery", "beat"]
        command += ["-l", "DEBUG", "-S", "django", "--max-interval", "1"]
        urls = {"CELERY_BROKER_URL": redis_url, "CELERY_RESULT_BACKEND": result_url}
        log = tmp_path / f"beat{next(logs)}.log"
        beat = Process(command, log, env={"DATABASE": str(database), **urls, **env})
        try:
            beat.wait_for_log(until)
        finally:
            beat.stop()
        for wrong in ("Cannot add entry", "Signal handler", "Traceback"):
            assert wrong not in beat.log_text()
        return beat

    return start


def rows(database: Path) -> Rows:
    """Every periodic task, by its name, with its interval."""
    with sqlite3.connect(database, timeout=20) as connection:
        connection.row_factory = sqlite3.Row
        found = connection.execute(
            "select task.*, every.every, every.period from django_celery_beat_periodictask task "
            "left join django_celery_beat_intervalschedule every on every.id = task.interval_id"
        )
        return {row["name"]: dict(row) for row in found}


def change(database: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(database, timeout=20) as connection:
        connection.execute(statement, values)


def ours(database: Path) -> list[str]:
    return sorted(name for name in rows(database) if name.startswith("gw_celery."))


def test_each_sweep_is_one_row_over_restarts(database: Path, run_beat: RunBeat) -> None:
    run_beat()
    first = rows(database)
    assert ours(database) == BOTH
    run_beat()
    again = rows(database)
    assert {name: row["id"] for name, row in again.items()} == {
        name: row["id"] for name, row in first.items()
    }
    told = ("task", "every", "period", "enabled")
    assert [again[PROBE][key] for key in told] == [PROBE, 10, "seconds", 1]
    assert again[BENCHMARK]["every"] == 86400


def test_a_changed_period_is_in_the_same_row_and_a_disabled_one_stays_so(
    database: Path, run_beat: RunBeat
) -> None:
    run_beat()
    before = rows(database)[PROBE]["id"]
    disable = "update django_celery_beat_periodictask set enabled = 0 where name = ?"
    change(database, disable, BENCHMARK)
    run_beat(PROBE_PERIOD="5")
    found = rows(database)
    row = found[PROBE]
    assert (row["id"], row["every"]) == (before, 5)
    assert not found[BENCHMARK]["enabled"]


def test_what_is_sent_goes_to_the_queue_of_the_sweeps_and_expires(
    run_beat: RunBeat, redis_server: testing.Server
) -> None:
    run_beat(until=f"{PROBE} sent", PROBE_PERIOD="1")
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as broker:
        headers = json.loads(broker.lindex(QUEUE, 0))["headers"]
    assert headers["task"] == PROBE
    assert headers["expires"] is not None
