"""Inputs that are not sent, for workers have told Redis that they would wait for too long."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group

import gw_celery as gw
from gw_celery.testing import eventually, workers
from tests import outages

LIMIT = 5.0
LONG = 60.0


@pytest.fixture
def celery_app(redis_url: str) -> Iterator[Celery]:
    made = Celery("unit", broker=redis_url, backend="cache+memory://", set_as_current=False)
    gw.preset(made)
    yield made
    workers.close_all()


@pytest.fixture
def patient(app: gw.App) -> Any:
    @app.remote(max_queue_time=LIMIT)
    async def patient(x=0): ...

    return patient


@pytest.fixture
def plain(app: gw.App) -> Any:
    @app.remote
    async def plain(x=0): ...

    return plain


Wait = Callable[[str, object], None]


@pytest.fixture
def wait(server: redis.Redis) -> Wait:
    """A function that publishes how long inputs of a queue would wait, as workers do."""

    def wait(queue: str, seconds: object) -> None:
        server.set(f"gw:wait:{queue}", str(seconds))

    server.config_resetstat()
    return wait


def reads(server: redis.Redis) -> int:
    """How often anything was read from Redis since the test began."""
    return int(server.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"])


def refusal(task: Any) -> gw.QueueTimeExceeded | None:
    try:
        task.delay()
    except gw.QueueTimeExceeded as refused:
        return refused
    return None


def test_what_would_wait_for_too_long_is_not_sent(
    patient: Any, wait: Wait, sent: list[Any]
) -> None:
    wait("gpu.patient", 40.0)
    with pytest.raises(gw.QueueTimeExceeded) as raised:
        patient.delay()
    assert sent == []
    assert (raised.value.estimate, raised.value.limit) == (40.0, LIMIT)
    assert (raised.value.task, raised.value.queue) == (patient.name, "gpu.patient")
    assert not raised.value.was_sent
    wait("gpu.patient", LIMIT)
    eventually(lambda: refusal(patient) is None)
    assert len(sent) == 1, "as long as it may"


def test_an_estimate_is_read_once_a_second(patient: Any, wait: Wait, server: redis.Redis) -> None:
    wait("gpu.patient", 40.0)
    for _ in range(20):
        assert refusal(patient)
    assert 1 <= reads(server) <= 2
    wait("gpu.patient", 41.0)
    eventually(lambda: (refused := refusal(patient)) and refused.estimate == 41.0)


@pytest.mark.parametrize("text", [None, "soon", "nan", "1e300"])
def test_what_is_no_estimate_admits_for_a_second_too(
    patient: Any, wait: Wait, server: redis.Redis, sent: list[Any], text: str | None
) -> None:
    if text is not None:
        wait("gpu.patient", text)
    for _ in range(20):
        patient.delay()
    assert len(sent) == 20
    assert 1 <= reads(server) <= 2


def test_an_estimate_is_found_behind_the_prefix_of_the_project(
    app: gw.App, patient: Any, server: redis.Redis
) -> None:
    app.celery.conf.broker_transport_options = {"global_keyprefix": "p:"}
    server.set("p:gw:wait:gpu.patient", "40")
    assert refusal(patient)


def test_await_and_the_others_are_told_the_same(patient: Any, wait: Wait, sent: list[Any]) -> None:
    wait("gpu.patient", 40.0)

    async def awaited() -> None:
        with pytest.raises(gw.QueueTimeExceeded):
            await patient()

    asyncio.run(awaited())
    for call in (patient.remote, patient.spawn, patient.s().delay):
        with pytest.raises(gw.QueueTimeExceeded):
            call()
    assert sent == []


def test_the_projects_limit_is_for_services_that_have_none(
    plain: Any, patient: Any, celery_app: Celery, wait: Wait
) -> None:
    celery_app.conf.gw_max_queue_time = LIMIT + 5
    wait("gpu.plain", 40.0)
    wait("gpu.patient", 40.0)
    limits = [refused and refused.limit for refused in map(refusal, (plain, patient))]
    assert limits == [LIMIT + 5, LIMIT]


def test_a_task_without_a_limit_asks_for_no_estimate(
    plain: Any, wait: Wait, server: redis.Redis
) -> None:
    wait("gpu.plain", 40.0)
    plain.delay()
    assert reads(server) == 0


def test_what_is_for_later_is_judged_later(patient: Any, wait: Wait, server: redis.Redis) -> None:
    wait("gpu.patient", 40.0)
    patient.apply_async(countdown=60)
    patient.apply_async(eta=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
    assert reads(server) == 0


def test_another_queue_has_an_estimate_of_its_own(patient: Any, wait: Wait) -> None:
    wait("elsewhere", 40.0)
    patient.delay()
    with pytest.raises(gw.QueueTimeExceeded) as raised:
        patient.apply_async(queue="elsewhere")
    assert raised.value.queue == "elsewhere"


def test_no_canvas_is_sent_in_part_and_no_retry_is_lost(
    patient: Any, plain: Any, wait: Wait, server: redis.Redis, sent: list[Any]
) -> None:
    wait("gpu.patient", 40.0)
    group(patient.s(), patient.s()).delay()
    chord([plain.s("a")], patient.si())
    patient.apply_async(retries=1)
    patient.apply_async(parent_id="the one before it in a chain")
    assert reads(server) == 0
    assert len(sent) == 4
    with pytest.raises(gw.QueueTimeExceeded):
        chain(patient.si(), plain.si("a")).delay()
    assert len(sent) == 4, "nothing of the chain has been sent"


def test_an_event_loop_reads_nothing_and_learns_from_a_thread(
    patient: Any, wait: Wait, server: redis.Redis
) -> None:
    wait("gpu.patient", 40.0)

    async def told() -> Any:
        return refusal(patient)

    assert asyncio.run(told()) is None, "no estimate has been read yet"
    assert eventually(lambda: asyncio.run(told())).estimate == 40.0

    def is_read_anew() -> bool:
        assert asyncio.run(told()), "what is known counts while it is read anew"
        return reads(server) >= 2

    assert eventually(is_read_anew)


def test_a_thread_that_reads_keeps_no_other_waiting(
    patient: Any, wait: Wait, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, get = threading.Event(), threading.Event(), redis.Redis.get

    def slowly(client: redis.Redis, key: str) -> Any:
        reading.set()
        assert go_on.wait(LONG)
        return get(client, key)

    wait("gpu.patient", 40.0)
    monkeypatch.setattr(redis.Redis, "get", slowly)
    refused: list[Any] = []
    reader = threading.Thread(target=lambda: refused.append(refusal(patient)))
    reader.start()
    assert reading.wait(LONG)
    assert refusal(patient) is None
    go_on.set()
    reader.join()
    assert refused[0].estimate == 40.0
    assert len(sent) == 1


def test_a_redis_that_is_away_admits(tmp_path: Path) -> None:
    with outages.outage(tmp_path / "away") as away:
        url = away.server.result_url
        with Celery("away", broker="memory://", backend=url, set_as_current=False) as celery_app:
            gw.preset(celery_app)

            @gw.App("away", celery_app).remote(max_queue_time=LIMIT, ignore_result=True)
            async def patient(): ...

            with redis.Redis(unix_socket_path=str(away.server.socket), db=1) as client:
                client.set("gw:wait:gpu.patient", "40")
                assert refusal(patient)
                client.save()
            away.stop()
            eventually(lambda: refusal(patient) is None)
            away.start()
            eventually(lambda: refusal(patient))
        workers.close_all()


def test_a_process_that_may_have_no_more_threads_reads_estimates_again_later(
    patient: Any, wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def call() -> None:
        patient.delay()

    wait(patient.gw_service.queue, LIMIT + 1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="thread"):
            asyncio.run(call())
    with pytest.raises(gw.QueueTimeExceeded):
        patient.delay()
