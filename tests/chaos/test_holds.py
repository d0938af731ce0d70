"""A Redis broker: what a worker holds outlives its connection, and comes back after its death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ledger
import pooled
import psutil
import pytest
import redis

from gw_celery import testing
from tests import outages, pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

TTL = 5.0
#: The time that the others have to notice, and to run what comes back.
NOTICED = TTL + 2

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(start_worker: StartWorker, ledger_path: Path) -> Start:
    def start_one(**options: Any) -> WorkerProcess:
        given = {"gw_worker_ttl": TTL, "worker_prefetch_multiplier": 8}
        settings = given | options.pop("settings", {})
        return pooling.start(start_worker, ledger_path, settings=settings, **options)

    return start_one


@pytest.fixture
def server(redis_server: testing.Server, redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as connected:
        yield connected


def signal_all(worker: WorkerProcess, signum: signal.Signals) -> None:
    """Send a signal to a worker and its children, the parent first."""
    parent = psutil.Process(worker.pid)
    for one in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            os.kill(one.pid, signum)


def ended(path: Path) -> set[str]:
    return {line[2] for line in ledger.words(path, "ended")}


def holds(server: redis.Redis, worker: WorkerProcess) -> int:
    return sum(server.hlen(key) for key in server.keys(f"gw:hold:{worker.node}:*"))


def test_what_a_killed_worker_held_runs_elsewhere_within_a_ttl(
    start: Start, server: redis.Redis, ledger_path: Path
) -> None:
    victim = start()
    names = [f"n{number}" for number in range(8)]
    sent = [pooled.four.delay(name, 10.0) for name in names]
    eventually(lambda: holds(server, victim) == len(names), 20)
    start()
    ready = time.monotonic()  # it trusts its own clock only after a whole ttl
    eventually(lambda: time.monotonic() > ready + TTL, TTL + 1)
    began = len(ledger.words(ledger_path, "began"))
    signal_all(victim, signal.SIGKILL)
    eventually(lambda: len(ledger.words(ledger_path, "began")) >= began + 4, NOTICED)
    assert {one.get(timeout=40) for one in sent} == set(names)
    counted = pooling.counts(ledger_path, names)
    assert (counted["lost"], counted["finished twice"]) == (0, 0)
    assert counted["started twice"] <= 4  # what was running in the killed worker
    eventually(lambda: not server.keys("gw:hold:*"))


def test_an_input_and_a_countdown_far_over_the_ttl_run_once(
    start: Start, server: redis.Redis, ledger_path: Path
) -> None:
    start(), start()
    sent = [
        pooled.four.delay("long", 4 * TTL),
        pooled.four.apply_async(("later", 0.0), countdown=4 * TTL),
    ]
    assert [one.get(timeout=6 * TTL) for one in sent] == ["long", "later"]
    names = ["long", "later"]
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)


def test_a_frozen_worker_that_wakes_up_announces_nothing_and_serves_again(
    start: Start, server: redis.Redis, ledger_path: Path
) -> None:
    frozen = start()
    names = [f"n{number}" for number in range(120)]
    link = pooled.note.s(name="frozen").set(queue="celery")
    sent = [pooled.four.apply_async((name, 1.0), link_error=link) for name in names]
    eventually(lambda: holds(server, frozen) > 8, 20)
    start()
    ready = time.monotonic()
    eventually(lambda: time.monotonic() > ready + TTL, TTL + 1)
    assert holds(server, frozen) > 8
    signal_all(frozen, signal.SIGSTOP)
    assert {one.get(timeout=60) for one in sent} == set(names)
    signal_all(frozen, signal.SIGCONT)
    eventually(lambda: "has declared this worker lost" in frozen.log_text(), 20)
    eventually(lambda: pooling.in_flight(frozen) == 0, 20)
    assert {one.get(timeout=1) for one in sent} == set(names)
    assert ledger.words(ledger_path, "errback") == []
    eventually(lambda: not server.keys("gw:hold:*"))
    more = [pooled.four.delay(f"more{number}", 0.2) for number in range(40)]
    assert len([one.get(timeout=40) for one in more]) == 40
    eventually(lambda: f"{frozen.node}:" in str(server.hgetall("gw:records")))


def test_connections_that_are_cut_start_nothing_twice(
    start: Start, server: redis.Redis, ledger_path: Path
) -> None:
    names = [f"n{number}" for number in range(200)]
    for name in names:
        pooled.four.delay(name, 0.3)
    own = {client["id"] for client in server.client_list()}
    start(), start()
    for _ in range(20):
        eventually(lambda: len(ledger.words(ledger_path, "began")) > 8, 20)
        time.sleep(0.3)
        for client in server.client_list():
            if client["id"] not in own:
                server.client_kill_filter(_id=client["id"])
    eventually(lambda: ended(ledger_path) == set(names), 90)
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    eventually(lambda: not server.keys("gw:hold:*"), 20)


@pytest.mark.parametrize("seconds", [2 * TTL])
def test_a_redis_that_was_away_for_long_has_no_worker_declared_lost(
    start: Start, tmp_path: Path, ledger_path: Path, seconds: float
) -> None:
    names = [f"n{number}" for number in range(120)]
    with outages.outage(tmp_path / "broker") as broker:
        given = {"broker": broker.server.broker_url, "result": broker.server.result_url}
        two = [start(**given), start(**given)]
        with pooling.client(**given) as app:
            for name in names:
                app.send_task("pooled.four", (name, 0.3), queue="cpu.four")
        eventually(lambda: len(ended(ledger_path)) > 10, 20)
        broker.stop()
        down = time.monotonic()
        eventually(lambda: time.monotonic() > down + seconds, seconds + 1)
        broker.start()
        eventually(lambda: ended(ledger_path) == set(names), 90)
        assert pooling.counts(ledger_path, names) == pooling.all_once(names)
        assert not [one for one in two if "is lost" in one.log_text()]


REFUSALS = {
    "READONLY": (
        lambda server: server.execute_command("REPLICAOF", "127.0.0.1", "1"),
        lambda server: server.execute_command("REPLICAOF", "NO", "ONE"),
    ),
    "OOM": (
        lambda server: server.config_set("maxmemory", 1),
        lambda server: server.config_set("maxmemory", 0),
    ),
    "NOPERM": (
        lambda server: server.acl_setuser("default", enabled=True, commands=["-@scripting"]),
        lambda server: server.acl_setuser("default", enabled=True, commands=["+@all"]),
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_broker_that_refuses_for_now_ends_nothing(
    kind: str, start: Start, tmp_path: Path, ledger_path: Path
) -> None:
    refuse, allow = REFUSALS[kind]
    names = [f"n{number}" for number in range(200)]
    with outages.outage(tmp_path / "broker") as broker:
        given = {"broker": broker.server.broker_url}
        worker = start(**given)
        with redis.Redis(unix_socket_path=str(broker.server.socket)) as server:
            with pooling.client(broker.server.broker_url, "disabled://") as app:
                for name in names:
                    app.send_task("pooled.four", (name, 0.05), queue="cpu.four")
            eventually(lambda: len(ended(ledger_path)) > 20, 20)
            refuse(server)
            try:
                refused = time.monotonic()
                eventually(lambda: time.monotonic() > refused + TTL, TTL + 1)
            finally:
                allow(server)
            eventually(lambda: ended(ledger_path) == set(names), 60)
            assert worker.exit_code is None
            assert pooling.counts(ledger_path, names) == pooling.all_once(names)
            eventually(lambda: not server.keys("gw:hold:*"), 20)
            assert worker.log_text().count("Redis refuses to give messages") <= 2


def celery_gw(server: testing.Server, *command: str) -> str:
    env = {"CELERY_BROKER_URL": server.broker_url, "CELERY_RESULT_BACKEND": server.result_url}
    env |= {"SETTINGS": json.dumps({"gw_worker_ttl": TTL}), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "pooled:celery", "gw", *command],
        env=os.environ | env,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_operator_gives_back_what_lost_workers_held_where_only_stock_workers_are_left(
    start: Start,
    start_worker: StartWorker,
    redis_server: testing.Server,
    server: redis.Redis,
    ledger_path: Path,
) -> None:
    victim = start()
    names = [f"n{number}" for number in range(8)]
    sent = [pooled.four.delay(name, 12.0) for name in names]
    eventually(lambda: holds(server, victim) == 8, 20)
    assert f"{victim.node}:" in celery_gw(redis_server, "holds")
    assert "are back" not in celery_gw(redis_server, "holds", "--reclaim")  # it lives
    signal_all(victim, signal.SIGKILL)
    pooling.start(start_worker, ledger_path, pool="prefork", is_loaded=False)
    assert "messages are back in their queues" in celery_gw(redis_server, "holds", "--reclaim")
    assert {one.get(timeout=90) for one in sent} == set(names)
    assert celery_gw(redis_server, "holds") == ""
