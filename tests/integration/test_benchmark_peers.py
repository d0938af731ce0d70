"""The benchmark against peers, at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

pytestmark = [pytest.mark.integration, pytest.mark.one_celery]

SMALLEST = ["--systems", "ours", "prefork", "--workloads", "fast", "--rounds", "1"]
SMALLEST += ["--seconds", "0.5", "--warm-up", "1"]


def test_one_command_measures_ours_and_prefork_and_writes_a_table_and_a_plot(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *SMALLEST, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["failures"] == {}
    ours, prefork = result["runs"]
    assert (ours["system"], prefork["system"]) == ("ours", "prefork")
    assert ours["rate"] > 0
    assert prefork["rate"] < 60  # one device, one input at a time, 20.1 ms each
    for one in (ours, prefork):
        assert one["p99"] >= one["p50"] > 0
        assert min(one["worker_cpu"], one["client_cpu"], one["pss"]) > 0
    assert "GPU pool, one replica" in done.stdout
    assert "\nfast " in (tmp_path / "table.md").read_text()
    assert (tmp_path / "peers.svg").read_text().startswith("<svg")
