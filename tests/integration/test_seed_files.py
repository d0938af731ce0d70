"""A deployment and its client as teams bring them along, as two files, but for the import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gw_celery import testing
from tests import processes

pytestmark = [pytest.mark.integration, pytest.mark.one_celery]

DEPLOY = """
import gw_celery as gw

app = gw.App("inference-server")

@app.remote(benchmark_dataset=[{"x": 2}])
async def square(x):
    return x * x
"""

CLIENT = """
import asyncio
from deploy import app, square

async def main():
    result = await square(5)  # Returns 25
    print(result)

asyncio.run(main())
"""

#: What a project with Celery has already.
PROJECT = """
from celery import Celery

import gw_celery as gw

celery = Celery("proj", include=["deploy"])
gw.preset(celery)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in (("deploy", DEPLOY), ("client", CLIENT), ("proj", PROJECT)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def run_client(project: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "client.py"],
        cwd=project,
        env=processes.environment(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_client_in_a_process_of_its_own_awaits_the_deployment(
    project: Path, redis_server: testing.Server, redis_url: str, result_url: str
) -> None:
    paths = os.pathsep.join((str(project), processes.environment()["PYTHONPATH"]))
    with processes.workers(project, redis_url, result_url) as start_worker:
        start_worker("proj:celery", queues="gpu", env={"PYTHONPATH": paths})
        done = run_client(project, {"CELERY_RESULT_BACKEND": result_url})
    assert (done.stdout, done.returncode) == ("25\n", 0), done.stderr


def test_a_client_without_a_result_backend_is_told_at_once(
    project: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CELERY_RESULT_BACKEND")
    done = run_client(project, {"CELERY_BROKER_URL": redis_url})
    assert done.returncode == 1
    assert "result_backend" in done.stderr.splitlines()[-1]
