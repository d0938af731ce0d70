"""Flower beside a worker that sizes itself: its buttons resize it, its pages show the figures."""

from __future__ import annotations

import html
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import scaled

from tests import pooling
from tests.processes import Process, StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

#: Slots of a replica: four inputs, and a plain task.
UNIT = 5


@dataclass(frozen=True)
class Flower:
    """A Flower that answers, and the worker that it is asked about."""

    url: str
    worker: WorkerProcess

    def press(self, button: str, **given: int) -> str:
        """Post what a button of the worker's page posts; what Flower then says."""
        query = urllib.parse.urlencode(given)
        try:
            return self._read(f"/api/worker/pool/{button}/{self.worker.node}?{query}", b"")
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.read().decode()

    def knows_worker(self) -> bool:
        """Whether it has heard of the worker, once it has asked all that there are."""
        return self.worker.node in json.loads(self._read("/api/workers?refresh=1"))

    def autoscaler(self) -> dict[str, Any]:
        """What its API says of the autoscaler once it has asked the worker."""
        told = json.loads(self._read(f"/api/workers?refresh=1&workername={self.worker.node}"))
        found: dict[str, Any] = told[self.worker.node]["stats"]["autoscaler"]
        return found

    def page(self) -> dict[str, str]:
        """The lines of the autoscaler's table on the worker's page, as they were last asked for."""
        _, table = self._read(f"/worker/{self.worker.node}").split("Autoscaler options</h2>")
        lines = re.findall(r"<td>(.*?)</td>\s*<td>(.*?)</td>", table[: table.index("</table>")])
        return {name: html.unescape(value) for name, value in lines}

    def _read(self, path: str, body: bytes | None = None) -> str:
        with urllib.request.urlopen(self.url + path, body, timeout=20) as answer:
            return str(answer.read().decode())


@pytest.fixture
def flower(
    start_worker: StartWorker, redis_url: str, result_url: str, ledger_path: Path, tmp_path: Path
) -> Iterator[Flower]:
    """Flower, and ``gw worker`` with one to four replicas."""
    env = {"LEDGER": str(ledger_path)}
    urls = {"CELERY_BROKER_URL": redis_url, "CELERY_RESULT_BACKEND": result_url}
    options = ["flower", "--port=0", "--address=127.0.0.1"]
    process = Process(
        [sys.executable, "-m", "celery", "-A", "scaled:celery", *options],
        tmp_path / "flower.log",
        env={**env, **urls, "FLOWER_UNAUTHENTICATED_API": "true"},
    )
    try:
        worker = start_worker(
            "scaled:celery",
            verb=["gw", "worker"],
            queues=None,
            extra_args=["--gpu", "CPU", "--autoscale", "4,1"],
            env=env,
        )
        pooling.wait_loaded(worker)
        port = eventually(lambda: listening_port(process), 40)
        found = Flower(f"http://127.0.0.1:{port}", worker)
        eventually(found.knows_worker, 20)
        yield found
    finally:
        process.stop()


def listening_port(process: Process) -> int:
    """The port that was free when the process began to listen; 0 before."""
    assert process.exit_code is None, process.log_tail()
    opened = psutil.Process(process.pid).net_connections("tcp")
    return next((one.laddr.port for one in opened if one.status == psutil.CONN_LISTEN), 0)


def test_the_buttons_resize_the_worker_and_the_page_shows_its_figures(flower: Flower) -> None:
    def settles(count: int) -> dict[str, Any]:
        """Wait for so many replicas, with none on its way; the autoscaler's figures then."""

        def figures() -> dict[str, Any]:
            shown = flower.autoscaler()
            return shown if shown["gw"]["actual"] == count else {}

        def are_ready() -> bool:
            listed = pooling.replicas(flower.worker, scaled.celery)
            return [one["state"] for one in listed] == ["ready"] * count

        eventually(are_ready, 20)
        return eventually(figures, 20)

    assert "min from 0 to max" in flower.press("autoscale", min=2 * UNIT, max=UNIT)
    assert "(min=10, max=10)" in flower.press("autoscale", min=2 * UNIT, max=2 * UNIT)
    shown = settles(2)
    assert (shown["max"], shown["min"], shown["current"]) == (10, 10, 10)

    assert "pool by 5" in flower.press("grow", n=UNIT)
    shown = settles(3)
    assert (shown["max"], shown["min"], shown["current"]) == (15, 10, 15)
    assert (shown["gw"]["most"], shown["gw"]["least"], shown["gw"]["desired"]) == (3, 2, 3)
    page = flower.page()
    assert (page["Max"], page["Min"], page["Current"]) == ("15", "10", "15")
    assert "'desired': 3" in page["Gw"]

    assert "pool by 10" in flower.press("shrink", n=2 * UNIT)
    shown = settles(1)
    assert (shown["max"], shown["min"], shown["current"]) == (15, 5, 5)

    # Each was done when the button was pressed, and not when the next decision was due.
    for said in (
        "from 1 to 2 replicas: its bounds were changed",
        "from 2 to 3 replicas: an operator asked for more",
        "from 3 to 1 replicas: an operator asked for less",
    ):
        assert said in flower.worker.log_text()
