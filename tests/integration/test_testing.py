"""``gw_celery.testing``: what the documentation shows, and workers that a test starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pooled
import psutil
import pytest

from gw_celery import testing
from tests.processes import ROOT, environment

pytestmark = pytest.mark.integration


@pytest.fixture
def _has_server(redis_server) -> None:
    """Skip where there is no program for it."""


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch, ledger_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:valkey", "-q"]
    env = {**environment(), "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        env.pop(name, None)
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.usefixtures("_has_server")
def test_the_examples_of_the_documentation_pass(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for name, code in blocks:
        (tmp_path / name).write_text(code)

    done = run_pytest(tmp_path)
    tests = sum(len(re.findall(r"def test_", code)) for _, code in blocks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tests == 2
    assert f"{tests} passed" in done.stdout


@pytest.mark.usefixtures("_has_server")
def test_a_test_that_fails_shows_the_log_of_its_worker(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["gw_celery.testing.fixtures"]\n')
    (tmp_path / "plain.py").write_text("import celery\ncelery = celery.Celery('plain')\n")
    (tmp_path / "test_it.py").write_text(
        "def test_it(gw_worker):\n"
        "    gw_worker('plain', '-P', 'solo', '-l', 'INFO')\n"
        "    assert 0\n"
    )
    done = run_pytest(tmp_path)
    assert "1 failed" in done.stdout
    assert "log of <Worker pid=" in done.stdout
    assert re.search(r"w-\w+@test ready", done.stdout)


@pytest.mark.usefixtures("_importable", "_has_server")
def test_a_worker_and_all_of_its_children_are_gone_behind_the_block(tmp_path: Path) -> None:
    with testing.worker(
        "pooled:celery", "-Q", "cpu", env={"SETTINGS": '{"gw_replicas": 2}'}, log_dir=tmp_path
    ) as worker:
        assert [one["state"] for one in worker.replicas()] == ["ready", "ready"]
        family = [worker.pid, *worker.children()]
        assert len(family) >= 3
        assert "redis+socket" in os.environ["CELERY_BROKER_URL"]
        url = os.environ["CELERY_BROKER_URL"]
    assert not [pid for pid in family if psutil.pid_exists(pid) and testing.is_alive(pid)]
    assert os.environ.get("CELERY_BROKER_URL") != url


@pytest.mark.usefixtures("_importable")
def test_a_worker_that_cannot_load_fails_its_test_at_once_with_the_reason(
    gw_worker, redis_server
) -> None:
    with pytest.raises(AssertionError, match=r"replica 0 of .* cannot serve") as caught:
        gw_worker("pooled:celery", "-Q", "cpu", env={"FAIL": "raise"})
    assert "the end of the log of <Worker pid=" in "".join(caught.value.__notes__)


@pytest.mark.usefixtures("_importable")
def test_a_worker_that_ends_fails_its_test_at_once(gw_worker, redis_server) -> None:
    with pytest.raises(AssertionError, match=r"ended with [12]"):
        gw_worker("there_is_no_such_module")


@pytest.mark.usefixtures("_importable")
def test_a_stock_pool_is_ready_when_it_answers(gw_worker, redis_server) -> None:
    worker = gw_worker("pooled:celery", "-Q", "cpu", env={"SETTINGS": '{"worker_pool": "solo"}'})
    assert worker.replicas() == []
    assert pooled.celery.control.ping([worker.node], timeout=5)
