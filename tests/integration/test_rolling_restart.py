"""A worker that is told to stop while another one serves the same queues, on both brokers."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest
from celery import Celery, states

from gw_celery import errors
from tests import pooling, services
from tests.conftest import needed
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

Start = Callable[..., WorkerProcess]
Send = Callable[..., Any]
#: Of a worker that takes far more than it has slots for.
GREEDY = {"worker_prefetch_multiplier": 16}


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A broker of this test alone: what one test leaves, another one's worker would run."""
    if request.param == "redis":
        yield request.getfixturevalue("redis_url")
        return
    with needed(services.rabbitmq_vhost()) as url:
        yield url


@pytest.fixture
def client(broker_url: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(broker_url, result_url) as app:
        yield app


@pytest.fixture
def send(client: Celery) -> Send:
    def send_task(name: str, *args: Any, queue: str = "", **options: Any) -> Any:
        queue = queue or f"cpu.{name.split('.')[1]}"
        return client.send_task(name, args, queue=queue, **options)

    return send_task


@pytest.fixture
def start(start_worker: StartWorker, ledger_path: Path, broker_url: str, result_url: str) -> Start:
    urls = {"broker": broker_url, "result": result_url}
    return functools.partial(pooling.start, start_worker, ledger_path, **urls)


def wait_taken(worker: WorkerProcess, app: Celery, what: str, count: int) -> None:
    """Wait until a worker has taken so many inputs that are ``reserved`` or ``scheduled``."""
    eventually(lambda: len(pooling.ask(worker, what, app) or ()) >= count, 20)


def have_ended(ledger_path: Path, names: list[str]) -> bool:
    return {line[2] for line in ledger.words(ledger_path, "ended")}.issuperset(names)


def named(kind: str, count: int) -> list[str]:
    return [f"{kind}{number}" for number in range(count)]


def test_what_waits_in_a_stopping_worker_runs_in_another_while_the_rest_ends(
    start: Start, send: Send, client: Celery, ledger_path: Path
) -> None:
    old = start(settings=GREEDY)
    kept, waiting, later = named("kept", 4), named("waiting", 20), named("later", 3)
    for name in kept:
        send("pooled.kept", name, True)
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4, 20)
    for name in later:
        send("pooled.kept", name, countdown=60)
    wait_taken(old, client, "scheduled", 3)
    for name in waiting:
        send("pooled.kept", name)
    wait_taken(old, client, "reserved", 5)
    new = start(settings=GREEDY)
    old.signal(signal.SIGTERM)
    eventually(lambda: have_ended(ledger_path, waiting), 8)
    wait_taken(new, client, "scheduled", 3)
    assert not have_ended(ledger_path, kept[:1])
    ledger.write("go")
    assert old.wait_exit(20) == 0
    assert pooling.counts(ledger_path, kept + waiting) == pooling.all_once(kept + waiting)


def test_what_gathers_in_a_stopping_worker_runs_in_another_while_its_batch_ends(
    start: Start, send: Send, client: Celery, ledger_path: Path
) -> None:
    old = start(module="gathered", settings=GREEDY)
    names = ["kept", *named("gathering", 8)]
    send("gathered.Kept.answer", "kept")
    eventually(lambda: pooling.began(ledger_path, "kept"), 20)
    for name in names[1:]:
        send("gathered.Kept.answer", name)
    wait_taken(old, client, "reserved", 8)
    start(module="gathered")
    old.signal(signal.SIGTERM)
    eventually(lambda: have_ended(ledger_path, names[1:]), 8)
    assert not have_ended(ledger_path, ["kept"])
    ledger.write("go")
    assert old.wait_exit(20) == 0
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)


def test_what_waits_for_its_eta_or_a_rate_limit_is_given_back(
    start: Start, send: Send, client: Celery, ledger_path: Path
) -> None:
    settings = {"task_annotations": {"pooled.plain_rest": {"rate_limit": "1/h"}}}
    old = start(settings=GREEDY | settings)
    sent = [send("pooled.plain_rest", name, queue="celery") for name in named("limited", 3)]
    far = send("pooled.four", "far", countdown=3600)
    wait_taken(old, client, "scheduled", 1)
    assert sent[0].get(timeout=20) == "limited0"
    assert old.stop() == 0
    new = start()
    assert [one.get(timeout=20) for one in sent] == named("limited", 3)
    wait_taken(new, client, "scheduled", 1)
    assert far.state == states.PENDING


def test_what_runs_at_the_end_of_the_grace_is_given_back_and_not_waited_for(
    start: Start, send: Send, ledger_path: Path
) -> None:
    old = start(settings={"gw_shutdown_timeout": 2.0})
    names = ["ours", "unforgiven"]
    late = [send("pooled.kept", names[0], True), send("pooled.unforgiven", names[1], 8.0)]
    early = send("pooled.early", "early", 60.0)
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 3, 20)
    start()
    began = time.monotonic()
    old.signal(signal.SIGTERM)
    old.wait_exit(20)
    assert 2.0 < time.monotonic() - began < 8.0
    assert isinstance(early.get(timeout=5, propagate=False), errors.WorkerStopped)
    ledger.write("go")
    assert [one.get(timeout=40) for one in late] == names
    counts = pooling.counts(ledger_path, names)
    assert counts == pooling.all_once(names, started_twice=2)
    assert len(pooling.began(ledger_path, "early")) == 1


def test_a_second_signal_gives_back_at_once_what_runs(
    start: Start, send: Send, ledger_path: Path
) -> None:
    old = start()
    names = named("kept", 4)
    sent = [send("pooled.kept", name, True) for name in names]
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4, 20)
    old.signal(signal.SIGTERM)
    old.wait_for_log("4 inputs have", 10)
    old.signal(signal.SIGQUIT)
    began = time.monotonic()
    old.wait_exit(20)
    assert time.monotonic() - began < 5
    assert "Traceback" not in old.log_text(), old.log_tail()
    ledger.write("go")
    start()
    assert [one.get(timeout=20) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names, started_twice=4)


def test_a_worker_that_stops_under_load_keeps_only_what_runs(
    start: Start, send: Send, ledger_path: Path
) -> None:
    old = start(settings=GREEDY)
    names = named("n", 300)
    send("pooled.kept", "kept", True)
    for name in names:
        send("pooled.four", name, 0.1)
    eventually(lambda: len(ledger.words(ledger_path, "began")) > 20, 20)
    start(settings=GREEDY)
    old.signal(signal.SIGTERM)
    eventually(lambda: have_ended(ledger_path, names), 40)
    assert not have_ended(ledger_path, ["kept"])
    ledger.write("go")
    assert old.wait_exit(20) == 0
    assert "Traceback" not in old.log_text(), old.log_tail()
    assert pooling.counts(ledger_path, ["kept", *names]) == pooling.all_once(["kept", *names])
