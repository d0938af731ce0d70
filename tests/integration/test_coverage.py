"""``./run coverage`` sees what runs in the children of a worker, not only in the tests' process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gw_celery import testing
from tests.processes import ROOT, environment

pytestmark = [pytest.mark.integration, pytest.mark.one_celery]

APP = ROOT / "tests" / "integration" / "apps" / "golden_app.py"

#: Does what a test does: a worker answers one input, and ends.
_SCRIPT = """
import sys
import golden_app
from gw_celery import testing
with testing.server(sys.argv[1]) as server:
    with testing.worker("golden_app:celery", "-Q", "cpu,celery", *sys.argv[2:], server=server):
        assert golden_app.tasks.single.delay(1).get(timeout=20) == 1
"""


@pytest.mark.parametrize("pool", ["gw_celery.pool:TaskPool", "prefork"])
def test_lines_that_only_a_child_runs_are_reported(
    pool: str, redis_server: testing.Server, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    settings = json.dumps({"worker_pool": pool})
    env = environment({"COVERAGE_FILE": str(tmp_path / ".coverage"), "SETTINGS": settings})

    def coverage(verb: str, *words: str) -> None:
        rcfile = f"--rcfile={ROOT / 'pyproject.toml'}"
        command = [sys.executable, "-m", "coverage", verb, rcfile, *words]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=100)

    coverage("run", "--source", str(APP.parent), "script.py", "data", "-c", "1")
    coverage("combine", "--quiet")
    coverage("json", "-o", "report.json")
    files = json.loads((tmp_path / "report.json").read_text())["files"]
    (lines,) = [one["executed_lines"] for name, one in files.items() if name.endswith(APP.name)]
    body = APP.read_text().splitlines().index("        await released(until)")
    assert body + 1 in lines
