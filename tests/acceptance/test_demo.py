"""``./run demo`` as a person runs it: example_project/demo.py with everything that it starts."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gw_celery import testing
from tests.acceptance.conftest import NEEDED
from tests.conftest import missing
from tests.processes import ROOT, Process, eventually, is_alive

pytestmark = pytest.mark.acceptance

DEMO = ROOT / "example_project" / "demo.py"
StartDemo = Callable[..., Process]


@pytest.fixture
def start_demo(redis_server: testing.Server, tmp_path: Path) -> Iterator[StartDemo]:
    """Start the demo with its data in a folder of the test."""
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            missing(f"{module} is not installed: pip install -e '.[example]'")
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        command = [sys.executable, str(DEMO), "--data", str(tmp_path / "data"), *arguments]
        # What another project left in the shell must not lead the demo to its server.
        foreign = {"CELERY_BROKER_URL": "redis://127.0.0.1:1/0"}
        started.append(Process(command, tmp_path / f"demo-{len(started)}.log", env=foreign))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def child_of(demo: Process, *words: str) -> int:
    """Wait until ``demo`` runs a command with all ``words`` in it; its pid."""

    def find() -> int:
        return next((pid for pid in demo.children() if set(words) <= set(command(pid))), 0)

    return eventually(find, 40)


def command(pid: int) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).cmdline()
    return []


def family_ends(demo: Process, code: int) -> None:
    family = demo.children()
    assert demo.wait_exit(40) == code, demo.log_tail()
    eventually(lambda: not [pid for pid in family if is_alive(pid)])


def test_the_check_asks_the_model_over_http_prints_the_answer_and_ends(
    start_demo: StartDemo,
) -> None:
    demo = start_demo("--check")
    child_of(demo, "flower")
    family = demo.children()
    assert demo.wait_exit(110) == 0, demo.log_tail()
    said = demo.log_text()
    assert "\nready\n" in said
    assert "question: How does bread get its bubbles?\nanswer:   Why loaves rise" in said
    eventually(lambda: not [pid for pid in family if is_alive(pid)])


def test_a_part_that_dies_ends_the_demo_and_shows_the_end_of_its_log(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    demo = start_demo()
    beat = child_of(demo, "beat")
    log = tmp_path / "data" / "logs" / "beat.log"
    eventually(lambda: "beat: Starting" in log.read_text(), 40)
    psutil.Process(beat).kill()
    family_ends(demo, code=1)
    assert "demo: beat ended with code -9; the end of" in demo.log_text()
    assert "beat: Starting" in demo.log_text()


def test_a_second_demo_on_the_same_data_is_refused_with_the_option_that_helps(
    start_demo: StartDemo,
) -> None:
    first = start_demo()
    child_of(first, "worker", "CPU")
    second = start_demo()
    assert second.wait_exit(40) == 1
    assert "already uses" in second.log_text()
    assert "stop it first, or choose another --data" in second.log_text()


def test_demos_that_start_at_once_have_ports_of_their_own(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    demos = [start_demo("--data", str(tmp_path / name)) for name in ("one", "two")]
    for part in ("uvicorn", "flower"):
        ports = [re.findall(r"--port\W(\d+)", " ".join(command(child_of(d, part)))) for d in demos]
        assert ports[0] != ports[1], ports


def test_ctrl_c_stops_everything_even_while_it_starts(start_demo: StartDemo) -> None:
    demo = start_demo()
    child_of(demo, "worker", "CPU")
    demo.signal(signal.SIGINT)
    family_ends(demo, code=0)
    assert demo.log_text().endswith("stopped\n")


def test_a_killed_demo_leaves_nothing_behind(start_demo: StartDemo) -> None:
    demo = start_demo()
    child_of(demo, "flower")
    family = demo.children()
    demo.signal(signal.SIGKILL)
    assert demo.wait_exit() == -signal.SIGKILL
    eventually(lambda: not [pid for pid in family if is_alive(pid)], 40)
