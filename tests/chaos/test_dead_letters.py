"""An input that was given up lies in the dead-letter queue, whence a person sends it again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from gw_celery import errors
from tests import pooling
from tests.processes import StartWorker, WorkerProcess, environment, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

SETTINGS = {"gw_max_deaths": 1, "gw_max_dead_letters": 2}
#: What a sender chooses and what a message that is sent again has, too.
SENT = ("correlation_id", "reply_to", "priority", "delivery_mode")


@pytest.fixture
def client(broker_url: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(broker_url, result_url) as app:
        yield app


@pytest.fixture
def empty(client: Celery) -> Iterator[None]:
    """No dead letters of other tests: they share a virtual host."""
    yield
    with client.connection_for_write() as connection:
        connection.default_channel.queue_delete("gw.dead")


@pytest.fixture
def worker(
    start_worker: StartWorker, ledger_path: Path, broker_url: str, empty: None
) -> WorkerProcess:
    return pooling.start(start_worker, ledger_path, broker=broker_url, settings=SETTINGS)


def dead(worker: WorkerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celery", "-b", worker.broker_url, "-A", "pooled:celery"]
    return subprocess.run(
        [*command, "gw", "dead", *arguments],
        env=environment({"CELERY_BROKER_URL": worker.broker_url, "SETTINGS": json.dumps(SETTINGS)}),
        cwd=worker.log.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lying(worker: WorkerProcess) -> list[dict[str, Any]]:
    done = dead(worker, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def poison(client: Celery, name: str, **options: Any) -> Any:
    sent = client.send_task("pooled.misbehave", ("kill", name), queue="cpu.misbehave", **options)
    with pytest.raises(errors.PoisonedInput):
        sent.get(timeout=60)
    return sent


def count_death(client: Celery, task_id: str) -> None:
    """Leave what another worker may have left that lost a child by this input."""
    with client.connection_for_write() as connection:
        redis = getattr(connection.default_channel, "client", client.backend.client)
        redis.set(f"gw:deaths:{task_id}", 1)


def test_what_is_given_up_is_listed_and_can_be_sent_again(
    worker: WorkerProcess, client: Celery, ledger_path: Path
) -> None:
    sent = poison(client, "first", headers={"mine": "kept"}, compression="gzip")
    eventually(lambda: "is a dead letter in the queue gw.dead" in worker.log_text())
    for _ in range(2):  # looking takes nothing away
        (one,) = lying(worker)
        assert (one["id"], one["task"], one["queue"]) == (
            sent.id,
            "pooled.misbehave",
            "cpu.misbehave",
        )
        assert (one["deaths"], one["worker"]) == (1, worker.node)
        assert "gw_max_deaths" in one["reason"]
    assert f"{sent.id}  pooled.misbehave  queue cpu.misbehave  1 deaths" in dead(worker).stdout
    before = len(pooling.began(ledger_path, "first"))
    count_death(client, sent.id)
    done = dead(worker, "--requeue", sent.id)
    assert done.returncode == 0, done.stderr
    # The body is what it was, and it is tried as often as a new one: it is not a suspect.
    eventually(lambda: len(pooling.began(ledger_path, "first")) > before, 30)
    eventually(lambda: worker.log_text().count("is a dead letter in the queue gw.dead") == 2, 60)
    assert len(pooling.began(ledger_path, "first")) == 2 * before
    (again,) = lying(worker)
    assert (again["id"], again["deaths"]) == (sent.id, 1)


def test_an_unknown_id_is_refused(worker: WorkerProcess) -> None:
    done = dead(worker, "--requeue", "absent")
    assert done.returncode == 1
    assert "no message of task absent is in the queue gw.dead" in done.stderr
    assert lying(worker) == []


def test_the_queue_never_grows_beyond_its_bound_and_a_message_is_sent_again_as_it_was(
    start_worker: StartWorker, ledger_path: Path, client: Celery, broker_url: str, empty: None
) -> None:
    options = {"headers": {"mine": "kept"}, "compression": "gzip", "priority": 3}
    first = client.send_task(
        "pooled.misbehave", ("kill", "first"), queue="cpu.misbehave", **options
    )
    with waiting(client) as before:
        before.requeue()
    worker = pooling.start(start_worker, ledger_path, broker=broker_url, settings=SETTINGS)
    with pytest.raises(errors.PoisonedInput):
        first.get(timeout=60)
    ids = [first.id, poison(client, "second").id]
    eventually(lambda: worker.log_text().count("is a dead letter in the queue gw.dead") == 2)
    poison(client, "third")
    worker.wait_for_log("the queue gw.dead is full with 2")
    assert [letter["id"] for letter in lying(worker)] == ids
    worker.stop()
    assert dead(worker, "--requeue", first.id).returncode == 0
    with waiting(client) as again:
        again.ack()
    again.headers.pop("redelivered", None)  # it was taken before
    assert again.body == before.body
    assert again.headers == before.headers | {"gw-requeued": True}
    for name in SENT:
        assert again.properties.get(name) == before.properties.get(name), name
    # A worker with another setting finds the queue made.
    settings = {**SETTINGS, "gw_max_dead_letters": 1}
    other = pooling.start(start_worker, ledger_path, broker=broker_url, settings=settings)
    poison(client, "fourth")
    other.wait_for_log("the queue gw.dead is full with 1")
    assert [letter["id"] for letter in lying(other)] == ids[1:]


@contextmanager
def waiting(client: Celery) -> Iterator[Any]:
    """The message that waits for a worker."""
    with client.connection_for_read() as connection:
        queue = client.amqp.queues["cpu.misbehave"](connection.default_channel)
        yield eventually(queue.get)


def test_more_are_listed_than_are_read_at_a_time_the_oldest_first(
    start_worker: StartWorker, ledger_path: Path, client: Celery, broker_url: str, empty: None
) -> None:
    settings = {"gw_max_deaths": 1}
    worker = pooling.start(start_worker, ledger_path, broker=broker_url, settings=settings)
    ids = [poison(client, "first").id, *(f"t{number}" for number in range(44))]
    worker.wait_for_log("is a dead letter in the queue gw.dead")
    with client.connection_for_write() as connection:
        for name in ids[1:]:  # as other workers write them
            headers = {"id": name, "task": "x", "gw-dead-exchange": "", "gw-dead-routing-key": "y"}
            connection.Producer().publish([], routing_key="gw.dead", headers=headers)
    assert [letter["id"] for letter in lying(worker)] == ids


def test_none_switches_the_queue_off(
    start_worker: StartWorker, ledger_path: Path, client: Celery, broker_url: str, empty: None
) -> None:
    settings = {"gw_max_deaths": 1, "gw_dead_letter_queue": None}
    worker = pooling.start(start_worker, ledger_path, broker=broker_url, settings=settings)
    poison(client, "first")
    assert lying(worker) == []
