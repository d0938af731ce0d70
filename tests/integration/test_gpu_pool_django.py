"""A Django project, set up as the documentation says, with its results in its own database."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.conftest import needed
from tests.processes import StartWorker, WorkerProcess, environment

pytestmark = pytest.mark.integration

#: Of the project's database after its migrations.
TABLES = 5


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A migrated database of the project: a path, or a name."""
    with ExitStack() as stack:
        name = str(tmp_path / "db.sqlite3")
        if request.param == "postgresql":
            name = stack.enter_context(needed(services.postgres_database()))
        run(name, "django", "migrate", "-v", "0")
        yield name


def run(database: str, *module: str, **env: str) -> str:
    settings = {"DATABASE": database, "DJANGO_SETTINGS_MODULE": "djangoed.settings", **env}
    done = subprocess.run(
        [sys.executable, "-m", *module],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["gw_celery.pool:TaskPool", "prefork"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def worker(pool: str, start_worker: StartWorker, database: str) -> WorkerProcess:
    env = {"DATABASE": database, "WORKER_POOL": pool}
    return start_worker("djangoed", queues="cpu,celery", concurrency=2, env=env)


def test_every_way_to_call_is_answered_through_the_projects_database(
    worker: WorkerProcess, pool: str, database: str, redis_url: str
) -> None:
    said = json.loads(run(database, "djangoed_shop.views", CELERY_BROKER_URL=redis_url))
    assert set(said) == {"wsgi", "asgi"}
    for answers in said.values():
        assert answers.pop("/awaits_failure/?char=33") == ["LookupError", "nothing there!"]
        name, text = answers.pop("/awaits_failure/?char=55296")
        chord_of_loop = answers.pop("/awaits_chord/?thread=")
        assert answers.pop("/awaits_chord/?thread=yes") == 2 * TABLES
        if pool == "prefork":  # no thread stands between its bodies and Django
            assert (name, "surrogates" in text) == ("UnicodeEncodeError", True)
            assert "SynchronousOnlyOperation" in chord_of_loop
        else:
            assert (name, "surrogates" in text) == ("OutcomeNotStored", True)
            assert chord_of_loop == 2 * TABLES
            assert "SynchronousOnlyOperation" not in worker.log_text()
        assert set(answers.values()) == {TABLES}, answers
    assert "WorkerLostError" not in worker.log_text()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("pool", ["gw_celery.pool:TaskPool"], indirect=True)
def test_the_parent_stores_a_failure_after_it_lost_its_connection(
    worker: WorkerProcess, database: str, redis_url: str
) -> None:
    module = ("djangoed_shop.views", "/awaits_limits/")
    said = json.loads(run(database, *module, CELERY_BROKER_URL=redis_url))
    answer = {"/awaits_limits/": ["TimeLimitExceeded"] * 2}
    assert said == {"wsgi": answer, "asgi": answer}
    assert "OperationalError" not in worker.log_text()
