"""An input that was given up lies in the dead-letter queue, whence a person sends it again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from gw_celery import conf, errors
from gw_celery.pool import dead_letters
from gw_celery.transport import find
from tests import pooling
from tests.processes import StartWorker, WorkerProcess, environment, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

SETTINGS = {"gw_max_deaths": 1, "gw_max_dead_letters": 2}
#: What a sender chooses and what a message that is sent again has, too.
SENT = ("correlation_id", "reply_to", "priority", "delivery_mode")
FIELDS: dict[str, Any] = {
    "body": "[]",
    "priority": None,
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "properties": {},
}


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


def test_what_is_given_up_is_listed_and_can_be_sent_again(
    worker: WorkerProcess, client: Celery, ledger_path: Path
) -> None:
    sent = poison(client, "first", headers={"mine": "kept"}, compression="gzip")
    eventually(lambda: "lies in the queue gw.dead" in worker.log_text())
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
    # As another worker may have left it.
    shared = find.redis_of(client, 5.0)
    assert shared is not None
    shared.client().set(shared.key("deaths", sent.id), 1)
    shared.close()
    done = dead(worker, "--requeue", sent.id)
    assert done.returncode == 0, done.stderr
    # The body is what it was, and it is tried as often as a new one: it is not a suspect.
    eventually(lambda: len(pooling.began(ledger_path, "first")) > before, 30)
    eventually(lambda: worker.log_text().count("lies in the queue gw.dead") == 2, 60)
    assert len(pooling.began(ledger_path, "first")) == 2 * before
    (again,) = lying(worker)
    assert (again["id"], again["deaths"]) == (sent.id, 1)


def test_an_unknown_id_is_refused(worker: WorkerProcess) -> None:
    done = dead(worker, "--requeue", "absent")
    assert done.returncode == 1
    assert "no message of task absent lies in the queue gw.dead" in done.stderr
    assert lying(worker) == []


def test_the_queue_never_grows_beyond_its_bound(client: Celery, empty: None) -> None:
    client.send_task("unserved.task", queue="unserved", compression="gzip", priority=3)
    with dead_letters.connect(client) as connection:
        queue = client.amqp.queues["unserved"](connection.default_channel)
        message = eventually(queue.get)
        message.ack()
        letter = dead_letters.to_dead_letter(message, reason="", since="", worker="w@h", deaths=3)
        bounded = bounded_by(2, client, connection)
        assert bounded.add(letter)
        # A worker with another setting finds the queue made.
        assert not bounded_by(1, client, connection).add(letter)
        assert [bounded.add(letter) for _ in range(3)] == [True, False, False]
        stored = list(bounded.read())
        assert [one.body for one in stored] == [message.body] * 2
        assert stored[0].headers == letter["headers"]
        assert stored[0].properties["correlation_id"] == message.properties["correlation_id"]
        assert bounded.requeue(message.headers["id"]) is not None
        again = eventually(queue.get)
        again.ack()
        assert again.body == message.body
        assert again.headers == message.headers | {"gw-requeued": True}
        assert {name: again.properties.get(name) for name in SENT} == {
            name: message.properties.get(name) for name in SENT
        }
        assert len(list(bounded.read())) == 1


def bounded_by(limit: int, client: Celery, connection: Any) -> dead_letters.DeadLetterQueue:
    return dead_letters.queue_of(client, connection, conf.Settings(max_dead_letters=limit))


def test_more_are_listed_than_are_read_at_a_time_the_oldest_first(
    client: Celery, empty: None
) -> None:
    with dead_letters.connect(client) as connection:
        queue = dead_letters.queue_of(client, connection, conf.Settings())
        names = [f"t{number}" for number in range(45)]
        for name in names:
            assert queue.add({**FIELDS, "headers": {"id": name}})
        assert [letter.headers["id"] for letter in queue.read()] == names


def test_none_switches_the_queue_off(
    start_worker: StartWorker, ledger_path: Path, client: Celery, broker_url: str, empty: None
) -> None:
    settings = {"gw_max_deaths": 1, "gw_dead_letter_queue": None}
    worker = pooling.start(start_worker, ledger_path, broker=broker_url, settings=settings)
    poison(client, "first")
    assert lying(worker) == []
