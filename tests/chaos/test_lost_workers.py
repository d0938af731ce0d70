"""A worker is killed, and what it had acknowledged early is answered by another one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chord
from celery.exceptions import WorkerLostError

from gw_celery import testing
from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

TTL = 5.0

Start = Callable[..., WorkerProcess]


@pytest.fixture(params=["rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    """The URL of a broker.

    RabbitMQ gives back at once what a killed worker had not acknowledged; on Redis, the others do.
    """
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


on_each_broker = pytest.mark.parametrize("broker", ["rabbitmq", "redis"], indirect=True)


@pytest.fixture
def start(start_worker: StartWorker, ledger_path: Path, broker: str) -> Start:
    def start_one(**options: Any) -> WorkerProcess:
        settings = {"gw_worker_ttl": TTL} | options.pop("settings", {})
        return pooling.start(start_worker, ledger_path, broker=broker, settings=settings, **options)

    return start_one


@pytest.fixture
def client(broker: str, result_url: str) -> Iterator[Celery]:
    with pooling.client(broker, result_url) as app:
        yield app


@pytest.fixture
def results(redis_server: testing.Server, result_url: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as connected:
        yield connected


@pytest.fixture
def shared(
    broker: str, results: redis.Redis, redis_server: testing.Server
) -> Iterator[redis.Redis]:
    """The Redis through which the workers know each other."""
    if broker.startswith("amqp"):
        yield results
        return
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as connected:
        yield connected


def send(client: Celery, body: str, name: str, seconds: float, **options: Any) -> Any:
    return client.send_task(f"pooled.{body}", (name, seconds), queue=f"cpu.{body}", **options)


def records(results: redis.Redis, worker: WorkerProcess) -> int:
    return sum(results.hlen(key) for key in results.keys(f"gw:early:{worker.node}:*"))


@on_each_broker
def test_a_killed_workers_early_inputs_fail_and_its_late_ones_run_again(
    start: Start, client: Celery, ledger_path: Path, results: redis.Redis, shared: redis.Redis
) -> None:
    other = start(queues="celery")  # serves none of what the victim runs
    victim = start(settings={"task_track_started": True})
    errback = client.signature("pooled.note", kwargs={"name": "told"}, queue="celery")
    early = [send(client, "early", f"e{n}", 600.0, link_error=errback) for n in range(3)]
    late = [send(client, "four", f"l{n}", 10.0) for n in range(3)]
    names = [*(f"e{n}" for n in range(3)), *(f"l{n}" for n in range(3))]
    eventually(lambda: all(pooling.began(ledger_path, name) for name in names), 20)
    assert records(results, victim) == 3, "late ones have no record"
    assert {sent.state for sent in (*early, *late)} == {"STARTED"}
    time.sleep(TTL)  # by then the other one trusts itself
    victim.kill()
    killed = time.monotonic()
    for sent in early:
        with pytest.raises(WorkerLostError, match=f"was running on {victim.node}, .*send it again"):
            sent.get(timeout=30)
    eventually(lambda: not shared.keys(f"gw:hold:{victim.node}:*"))
    assert time.monotonic() - killed < TTL + 2.0, "one rule for both"
    assert not any(victim.node.encode() in name for name in shared.hkeys("gw:records"))
    start()
    assert [sent.get(timeout=60) for sent in late] == ["l0", "l1", "l2"]
    assert [len(pooling.began(ledger_path, name)) for name in names] == [1, 1, 1, 2, 2, 2]
    eventually(lambda: pooling.wrote(ledger_path, "errback", "told") == 3, 20)
    eventually(lambda: not records(results, victim))
    (tombstone,) = results.keys("gw:dead:*")
    assert victim.node.encode() in tombstone
    assert other.log_text().count("with 3 acknowledged inputs") == 1
    other.stop()
    left = [*shared.keys("gw:*"), *shared.hkeys("gw:records"), *shared.zrange("gw:alive", 0, -1)]
    (mark,) = [key for key in left if other.node.encode() in key]
    assert mark.startswith(b"gw:dead:"), "a worker that stops leaves nothing else"
    assert 0 < shared.ttl(mark) <= 60


def test_a_chord_learns_of_a_lost_part(start: Start, client: Celery, ledger_path: Path) -> None:
    victim = start()
    part = client.signature("pooled.early", ("part", 600.0), queue="cpu.early")
    quick = client.signature("pooled.early", ("quick", 0.0), queue="cpu.early")
    body = client.signature("pooled.total", queue="cpu.total")
    sent = chord([part, quick], body, app=client).apply_async()
    eventually(lambda: pooling.began(ledger_path, "part"), 20)
    start()
    victim.kill()
    with pytest.raises(Exception, match="was running on"):
        sent.get(timeout=30)


def test_a_worker_that_starts_again_under_its_name_is_another_one(
    start: Start, client: Celery, ledger_path: Path
) -> None:
    named = ["-n", "same@test"]
    victim = start(extra_args=named, wait_ready=False)
    pooling.wait_loaded(victim)
    lost = send(client, "early", "lost", 600.0)
    eventually(lambda: pooling.began(ledger_path, "lost"), 20)
    victim.kill()
    again = start(extra_args=named, wait_ready=False)
    pooling.wait_loaded(again)
    # It runs for as long as its predecessor is looked for, and longer.
    kept = send(client, "early", "kept", 2 * TTL)
    with pytest.raises(WorkerLostError, match="was running on same@test"):
        lost.get(timeout=30)
    assert kept.get(timeout=30) == "kept"
    assert again.log_text().count("with 1 acknowledged inputs") == 1


def test_a_worker_that_is_merely_slow_is_left_alone(
    start: Start, client: Celery, ledger_path: Path, results: redis.Redis
) -> None:
    slow, other = start(), start()
    sent = {name: send(client, "early", name, 2 * TTL) for name in ("a", "b", "c", "d")}
    eventually(lambda: records(results, slow), 20)
    slow.signal(signal.SIGSTOP)
    time.sleep(0.6 * TTL)
    slow.signal(signal.SIGCONT)
    assert [one.get(timeout=40) for one in sent.values()] == list(sent)
    assert "is lost" not in other.log_text()
    assert results.keys("gw:dead:*") == []


@on_each_broker
def test_a_frozen_worker_is_declared_lost_and_goes_on_as_another(
    start: Start, client: Celery, ledger_path: Path, shared: redis.Redis
) -> None:
    other, frozen = start(queues="celery"), start()
    lost = send(client, "early", "lost", 600.0)
    eventually(lambda: pooling.began(ledger_path, "lost"), 20)
    time.sleep(TTL)
    frozen.signal(signal.SIGSTOP)
    with pytest.raises(WorkerLostError, match=f"was running on {frozen.node}"):
        lost.get(timeout=30)
    frozen.signal(signal.SIGCONT)
    frozen.wait_for_log("has declared this worker lost")
    assert other.log_text().count(f"worker {frozen.node}:") == 1
    kept = send(client, "early", "kept", 0.1)
    assert kept.get(timeout=30) == "kept"
    eventually(lambda: len(shared.zrange("gw:alive", 0, -1)) == 2)


def test_what_ended_or_died_with_its_child_is_on_record_no_more(
    start: Start, client: Celery, ledger_path: Path, results: redis.Redis
) -> None:
    worker = start()
    assert send(client, "early", "quick", 0.0).get(timeout=20) == "quick"
    killed = client.send_task("pooled.plain_misbehave", ("kill", "dies"), queue="celery")
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        killed.get(timeout=20)
    eventually(lambda: records(results, worker) == 0)


def test_an_early_input_is_acknowledged_when_its_record_is_written(
    start: Start, client: Celery, ledger_path: Path, results: redis.Redis
) -> None:
    worker = start()
    results.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    try:
        early = send(client, "early", "early", 0.0)
        worker.wait_for_log(f"{early.id}] received")
        late = send(client, "four", "late", 0.0)
        eventually(lambda: pooling.began(ledger_path, "late"), 20)
        eventually(lambda: pooling.ask(worker, "active", client))
        assert [one["id"] for one in pooling.ask(worker, "active", client)] == [late.id]
        assert pooling.began(ledger_path, "early") == []
    finally:
        results.execute_command("CLIENT", "UNPAUSE")
    assert early.get(timeout=30) == "early"
