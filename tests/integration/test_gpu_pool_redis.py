"""The GPU pool and its Redis: what a worker takes is never lost, and stock tools read it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import ledger
import pooled
import pytest
import redis

from tests import outages, pooling, services
from tests.pooling import StartPooled
from tests.processes import StartWorker, eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    with services.redis_at(redis_url) as client:
        yield client


def held(server: redis.Redis) -> int:
    """Return how many messages all workers hold."""
    return sum(server.hlen(key) for key in server.scan_iter("gw:hold:*"))


def ended(path: Path) -> set[str]:
    return {line[2] for line in ledger.words(path, "ended")}


def test_stock_tools_see_an_ordinary_redis(start_pooled: StartPooled, redis_url: str) -> None:
    worker = start_pooled()
    broker = pooling.ask(worker, "stats")["broker"]
    assert broker["transport"] == "redis"
    with pooled.celery.connection_for_read() as plain:
        shown = ("transport", "transport_options", "uri_prefix", "virtual_host", "ssl")
        assert {key: broker[key] for key in shown} == {key: plain.info()[key] for key in shown}
    assert {one["name"] for one in pooling.ask(worker, "active_queues")} >= {"celery", "cpu.four"}


def test_a_stock_worker_and_ours_share_a_queue(
    start_pooled: StartPooled, start_worker: StartWorker, server: redis.Redis, ledger_path: Path
) -> None:
    names = [f"n{number}" for number in range(120)]
    ours = start_pooled(queues="celery")
    env = {"LEDGER": str(ledger_path), "SETTINGS": json.dumps({"worker_pool": "prefork"})}
    stock = start_worker("pooled:celery", queues="celery", env=env)
    sent = [pooled.plain_rest.delay(name, 0.05) for name in names]
    assert [one.get(timeout=30) for one in sent] == names
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)
    done = [sum(pooling.ask(one, "stats")["total"].values()) for one in (ours, stock)]
    assert sum(done) == 120
    assert min(done) > 10
    eventually(lambda: not held(server) and not server.exists("unacked", "unacked_index"))


def test_a_queue_that_was_full_is_read_again_at_once(start_pooled: StartPooled) -> None:
    start_pooled()
    began = time.monotonic()
    sent = [pooled.single.delay(f"n{number}") for number in range(200)]
    assert [one.get(timeout=30) for one in sent] == [f"n{number}" for number in range(200)]
    # The queue pauses for every few inputs; kombu's BRPOP reads it again a second later.
    assert time.monotonic() - began < 5


def test_a_lost_link_to_redis_is_made_anew(start_pooled: StartPooled, server: redis.Redis) -> None:
    worker = start_pooled()

    def links() -> list[int]:
        named = [one for one in server.client_list() if one["name"] == "gw_celery-watch"]
        return sorted(int(one["id"]) for one in named)

    (link,) = eventually(links)
    server.client_kill_filter(_id=link)
    eventually(lambda: worker.log_text().count("Connected to redis") == 2, 20)
    assert pooled.four.delay("last").get(timeout=10) == "last"


def test_workers_that_are_killed_while_they_take_messages_lose_none(
    start_pooled: StartPooled, server: redis.Redis, ledger_path: Path
) -> None:
    names = [f"n{number}" for number in range(1500)]
    settings = {"gw_worker_ttl": 5.0}
    for name in names:
        pooled.hold.delay(name, 0.2)
    for left in (1400, 900, 400):
        worker = start_pooled(settings=settings, is_loaded=False, wait_ready=False)
        eventually(lambda most=left: server.llen("cpu.hold") < most, 40, 0.001)
        worker.kill()
        # The child writes to the ledger for a moment longer, and its answers are not read.
        eventually(lambda dead=worker: not dead.children(), 20)
        assert held(server) > 0
        assert server.llen("cpu.hold") + held(server) + len(ended(ledger_path)) >= len(names)
    start_pooled(settings=settings)
    eventually(lambda: ended(ledger_path) == set(names), 60)
    eventually(lambda: not held(server) and not server.exists("cpu.hold"), 20)


def test_a_warm_stop_under_load_settles_every_message(
    start_pooled: StartPooled, server: redis.Redis, ledger_path: Path
) -> None:
    names = [f"n{number}" for number in range(300)]
    worker = start_pooled(settings={"worker_prefetch_multiplier": 8})
    for name in names:
        pooled.four.delay(name, 0.02)
    eventually(lambda: len(ended(ledger_path)) > 40, 20)
    assert worker.stop() == 0
    assert held(server) == 0
    # What has ended is acknowledged, the rest is in the queue: nothing runs twice.
    assert server.llen("cpu.four") + len(ended(ledger_path)) == len(names)
    start_pooled()
    eventually(lambda: ended(ledger_path) == set(names), 40)
    assert pooling.counts(ledger_path, names) == pooling.all_once(names)


def test_a_cold_stop_gives_back_what_was_not_done(
    start_pooled: StartPooled, server: redis.Redis, ledger_path: Path
) -> None:
    worker = start_pooled(settings={"worker_prefetch_multiplier": 8})
    sent = [pooled.four.delay(f"n{number}", 30.0) for number in range(60)]
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 4, 20)
    worker.signal(signal.SIGQUIT)
    worker.wait_exit()
    assert held(server) == 0
    assert server.llen("cpu.four") >= len(sent) - 4


@pytest.mark.parametrize("etas", [0, 6])
def test_no_more_is_taken_than_the_prefetch_count(
    start_pooled: StartPooled, server: redis.Redis, ledger_path: Path, etas: int
) -> None:
    worker = start_pooled(queues="cpu.four", settings={"worker_prefetch_multiplier": 3})
    prefetch = pooling.ask(worker, "stats")["prefetch_count"]
    assert prefetch == 12
    later = [pooled.four.apply_async((f"eta{number}",), countdown=2.0) for number in range(etas)]
    eventually(lambda: sum(map(len, (pooling.ask(worker, "scheduled") or {},))) == etas, 20)
    names = [f"n{number}" for number in range(200)]
    for name in names:
        pooled.four.delay(name, 0.1)
    seen = []

    def is_over() -> bool:
        seen.append(held(server))
        return len(ended(ledger_path)) == len(names) + etas

    eventually(is_over, 40, 0.002)
    # An acknowledgement frees its place one turn of the loop before Redis knows of it.
    assert prefetch <= max(seen) <= prefetch + etas + 4
    assert [one.get(timeout=5) for one in later] == [f"eta{number}" for number in range(etas)]


def test_what_is_no_message_ends_no_worker(
    start_pooled: StartPooled, server: redis.Redis, ledger_path: Path
) -> None:
    names = [f"n{number}" for number in range(200)]
    for number, name in enumerate(names):
        pooled.four.delay(name)
        if number % 10 == 5:
            server.lpush("cpu.four", "this is no JSON", '{"properties": null}', "[1]")
    worker = start_pooled()
    eventually(lambda: ended(ledger_path) == set(names), 20)
    assert worker.exit_code is None
    assert pooled.four.delay("last").get(timeout=10) == "last"
    eventually(lambda: not held(server))
    assert worker.log_text().count("Connected to redis") == 1


#: Writes a key of another type; the first is for keys that must not be hashes.
WRONG = (
    lambda client, key: client.hset(key, "x", "y"),
    lambda client, key: client.set(key, "x"),
)


@pytest.mark.parametrize("when", ["before its start", "while it runs"])
@pytest.mark.parametrize(
    "key",
    [
        "cpu.add",
        "_kombu.binding.celery",
        "_kombu.binding.celery.pidbox",
        "gw:alive",
        "gw:records",
    ],
)
def test_a_key_of_another_type_ends_no_worker_and_stops_no_other_queue(
    start_pooled: StartPooled, server: redis.Redis, key: str, when: str
) -> None:
    def write() -> None:
        server.delete(key)
        WRONG[key == "gw:records"](server, key)

    if when == "before its start":
        write()
    worker = start_pooled(is_loaded=False, settings={"gw_worker_ttl": 5.0})
    if when == "while it runs":
        assert pooled.four.delay("first").get(timeout=30) == "first"
        write()
    sent = [pooled.four.delay(f"n{number}", 0.5) for number in range(40)]
    assert [one.get(timeout=30) for one in sent] == [f"n{number}" for number in range(40)]
    if key.startswith("cpu."):
        eventually(lambda: f"the key {key} in Redis is" in worker.log_text(), 20)
    elif key.startswith("gw:"):
        eventually(lambda: f"the key {key} in Redis was a " in worker.log_text(), 20)
    elif when == "before its start":
        assert f"the key {key} in Redis is not a set" in worker.log_text()
    assert worker.exit_code is None
    assert worker.stop() == 0


def test_a_server_that_is_restarted_forgets_the_script_and_is_told_again(
    start_pooled: StartPooled, tmp_path: Path, ledger_path: Path
) -> None:
    names = [f"n{number}" for number in range(200)]
    with outages.outage(tmp_path / "broker") as broker:
        given = {"broker": broker.server.broker_url, "result": broker.server.result_url}
        worker = start_pooled(**given)
        with pooling.client(**given) as app:
            for name in names[:100]:
                app.send_task("pooled.four", (name, 0.02), queue="cpu.four")
        eventually(lambda: len(ended(ledger_path)) > 40, 20)
        broker.stop()
        broker.start()
        with (
            redis.Redis(unix_socket_path=str(broker.server.socket)) as client,
            pooling.client(**given) as app,
        ):
            for name in names[100:]:
                app.send_task("pooled.four", (name, 0.02), queue="cpu.four")
            eventually(lambda: ended(ledger_path) == set(names), 60)
            assert "cmdstat_rpop" in client.info("commandstats")
            eventually(lambda: not held(client))
            assert worker.stop() == 0


def test_a_huge_input_is_served_among_small_ones(
    start_pooled: StartPooled, server: redis.Redis, ledger_path: Path
) -> None:
    huge = "x" * 5_000_000
    sent = [pooled.plain_fails.delay(huge if number == 10 else "small") for number in range(20)]
    start_pooled()
    for one in sent:
        # The text of an error is cut.
        with pytest.raises(ValueError, match=r"^(small$|x{500})"):
            one.get(timeout=20)
    eventually(lambda: not held(server))
