"""A watcher whose connection to Redis is lost; its answers are stored here, by no worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery

import gw_celery as gw
from gw_celery import devserver
from gw_celery.client import calls, result_sources

pytestmark = pytest.mark.integration

LONG = 30.0


@pytest.fixture
def app(redis_url: str, result_url: str) -> Celery:
    made = Celery("watched", broker=redis_url, backend=result_url, set_as_current=False)
    gw.preset(made)
    return made


@pytest.fixture
def watcher(app: Celery) -> Iterator[calls.Watcher]:
    made = calls.Watcher(app)
    yield made
    made.close()


async def until(claim: Callable[[], Any]) -> None:
    async with asyncio.timeout(LONG):
        while not claim():  # noqa: ASYNC110 what is waited for happens in Redis
            await asyncio.sleep(0.01)


def test_each_loss_of_the_connection_is_followed_by_the_first_delay(
    app: Celery,
    watcher: calls.Watcher,
    redis_server: devserver.Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def is_subscribed(task_id: str) -> bool:
        channel = app.backend.get_key_for_task(task_id)
        return client.pubsub_numsub(channel)[0][1] > 0

    async def lost_and_answered(task_id: str) -> Any:
        answer = asyncio.ensure_future(watcher.meta(task_id))
        await until(lambda: is_subscribed(task_id))
        before = len(caplog.records)
        client.client_kill_filter(_type="pubsub")
        await until(lambda: len(caplog.records) > before)
        app.backend.store_result(task_id, int(task_id), "SUCCESS")
        return (await asyncio.wait_for(answer, LONG))["result"]

    async def three_times() -> list[Any]:
        return [await lost_and_answered(one) for one in "123"]

    with (
        redis.Redis(unix_socket_path=str(redis_server.socket)) as client,
        caplog.at_level(logging.WARNING, result_sources.__name__),
    ):
        assert asyncio.run(three_times()) == [1, 2, 3]
    assert [record.args[1] for record in caplog.records] == [0.1, 0.1, 0.1]


def test_a_notification_that_was_lost_is_made_good_however_many_calls_come(
    app: Celery, watcher: calls.Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(*args: Any) -> None:
        await asyncio.Event().wait()

    async def answered() -> Any:
        answer = asyncio.ensure_future(watcher.meta("kept"))
        await until(lambda: watcher._source.waiting)
        app.backend.store_result("kept", "there", "SUCCESS")
        others = [answer]
        async with asyncio.timeout(LONG):
            while not answer.done():
                others.append(asyncio.ensure_future(watcher.meta(f"other-{len(others)}")))
                await asyncio.sleep(0.02)
        for one in others:
            one.cancel()
        return (await answer)["result"]

    monkeypatch.setattr(result_sources.RedisSource, "_listen", deaf)
    monkeypatch.setattr(result_sources, "SWEEP", 0.5)
    assert asyncio.run(answered()) == "there"


def test_an_unforeseen_error_is_logged_and_answers_still_come(
    app: Celery,
    watcher: calls.Watcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read, fails = result_sources.RedisSource._read, iter([ValueError("unforeseen")])

    async def failing_once(*args: Any) -> None:
        for error in fails:
            raise error
        await read(*args)

    async def answered() -> Any:
        return (await asyncio.wait_for(watcher.meta("1"), LONG))["result"]

    monkeypatch.setattr(result_sources.RedisSource, "_read", failing_once)
    app.backend.store_result("1", "here", "SUCCESS")
    assert asyncio.run(answered()) == "here"
    assert "unforeseen" in caplog.text
    assert "Traceback" in caplog.text
