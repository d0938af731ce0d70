"""The clock of a worker's machine jumps by an hour while inputs with time limits are in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ledger
import pytest
import redis
from celery import Celery

from gw_celery import testing
from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NAMES = [f"n{number}" for number in range(8)]
#: What every Python process of a worker runs first: ``time.time()`` is off by what the file says.
SITECUSTOMIZE = """
import os, time

_true = time.time

def _shifted():
    try:
        with open(os.environ["CLOCK"]) as clock:
            return _true() + float(clock.read() or 0)
    except FileNotFoundError:
        return _true()

time.time = _shifted
"""


class Clock:
    """The time of day of the workers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def jump(self, seconds: float) -> None:
        written = self._path.with_suffix(".new")
        written.write_text(str(seconds))
        written.rename(self._path)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("CLOCK", str(tmp_path / "clock"))
    return Clock(tmp_path / "clock")


@pytest.fixture
def app(broker_url: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(broker_url, result_url) as app:
        yield app


def send(app: Celery, seconds: float, names: list[str]) -> list[str]:
    limits = {"soft_time_limit": 40, "time_limit": 60}
    return [
        app.send_task("pooled.four", (one, seconds), queue="cpu.four", **limits).id for one in names
    ]


def stored(server: testing.Server, sent: list[str]) -> bool:
    with redis.Redis(unix_socket_path=str(server.socket), db=1) as client:
        found = client.mget([f"celery-task-meta-{one}" for one in sent])
    return all(one and b'"SUCCESS"' in one for one in found)


def wakes(worker: WorkerProcess, times: int, app: Celery) -> None:
    """Have the worker's loop turn, so that it looks at its clocks."""
    for _ in range(times):
        assert pooling.ask(worker, "ping", app) == {"ok": "pong"}


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_jump_of_the_clock_fires_no_limit_and_runs_nothing_twice(
    jump: float,
    clock: Clock,
    app: Celery,
    start_worker: StartWorker,
    ledger_path: Path,
    redis_server: testing.Server,
) -> None:
    settings = {"gw_worker_ttl": 5.0}  # the inputs last longer
    url = app.conf.broker_url
    workers = [
        pooling.start(start_worker, ledger_path, broker=url, settings=settings) for _ in range(2)
    ]
    sent = send(app, 6.0, NAMES[:4])
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4)
    clock.jump(jump)
    eventually(lambda: len(ledger.words(ledger_path, "ended")) >= 4, 20)
    sent += send(app, 6.0, NAMES[4:])
    eventually(lambda: len(ledger.words(ledger_path, "began")) >= 8, 20)
    clock.jump(0.0)
    eventually(lambda: stored(redis_server, sent), 40)
    for worker in workers:
        wakes(worker, 3, app)
    assert pooling.counts(ledger_path, NAMES) == pooling.all_once(NAMES)
    assert not ledger.words(ledger_path, "softly")
    assert not ledger.words(ledger_path, "cancelled")
    for worker in workers:
        assert "is killed" not in worker.log_text()
        assert "is lost" not in worker.log_text()
