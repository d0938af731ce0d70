"""Waiting while the connection to Redis is lost; the answers are stored here, by no worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
from celery import Celery

import gw_celery as gw
from gw_celery.testing import workers

if TYPE_CHECKING:
    from gw_celery import testing

pytestmark = pytest.mark.integration

LONG = 30.0


@pytest.fixture
def app(redis_url: str, result_url: str) -> Iterator[Celery]:
    made = Celery("watched", broker=redis_url, backend=result_url, set_as_current=False)
    gw.preset(made)
    yield made
    workers.close_all()


@pytest.fixture
def asked(app: Celery) -> Any:
    @gw.App("watched", app).remote
    async def asked(): ...

    return asked


@pytest.fixture
def client(redis_server: testing.Server) -> Iterator[redis.Redis]:
    """A client of the database that results are in."""
    with redis.Redis(unix_socket_path=str(redis_server.socket), db=1) as made:
        yield made


async def until(claim: Callable[[], Any]) -> None:
    async with asyncio.timeout(LONG):
        while not claim():  # noqa: ASYNC110 what is waited for happens in Redis
            await asyncio.sleep(0.01)


def calling(task: Any, task_id: str) -> asyncio.Future[Any]:
    return asyncio.ensure_future(task.options(task_id=task_id, timeout=LONG).aremote())


def is_subscribed(app: Celery, client: redis.Redis, task_id: str) -> bool:
    channel = app.backend.get_key_for_task(task_id)
    return bool(client.pubsub_numsub(channel)[0][1] > 0)


def test_each_loss_of_the_connection_is_followed_by_the_first_delay(
    app: Celery, asked: Any, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def lost_and_answered(task_id: str) -> Any:
        answer = calling(asked, task_id)
        await until(lambda: is_subscribed(app, client, task_id))
        before = len(caplog.records)
        client.client_kill_filter(_type="pubsub")
        await until(lambda: len(caplog.records) > before)
        app.backend.store_result(task_id, int(task_id), "SUCCESS")
        return await answer

    async def three_times() -> list[Any]:
        return [await lost_and_answered(one) for one in "123"]

    with caplog.at_level(logging.WARNING, "gw_celery"):
        assert asyncio.run(three_times()) == [1, 2, 3]
    texts = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in texts] == ["the result backend cannot be read"] * 3
    assert [text.rpartition("; ")[2] for text in texts] == ["next try in 0.1 s"] * 3
    assert [record.exc_info for record in caplog.records] == [None] * 3


def test_a_notification_that_was_lost_is_made_good_however_many_calls_come(
    app: Celery, asked: Any, client: redis.Redis
) -> None:
    async def answered() -> Any:
        answer = calling(asked, "kept")
        await until(lambda: is_subscribed(app, client, "kept"))
        others = [calling(asked, "other-0")]
        # By then what is stored of the first has been looked for.
        await until(lambda: is_subscribed(app, client, "other-0"))
        record = {"status": "SUCCESS", "result": "there", "traceback": None, "task_id": "kept"}
        client.set(app.backend.get_key_for_task("kept"), app.backend.encode(record))
        while not answer.done():
            others.append(calling(asked, f"other-{len(others)}"))
            await asyncio.sleep(0.02)
        for one in others:
            one.cancel()
        await asyncio.wait(others)
        return await answer

    assert asyncio.run(answered()) == "there"


def test_a_server_that_accepts_and_never_answers_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    again = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        if len(writers) == 2:
            again.set()

    async def act() -> None:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"redis://127.0.0.1:{port}"
            app = Celery("silent", broker="memory://", backend=url, set_as_current=False)
            gw.preset(app)

            @gw.App("silent", app).remote
            async def silent(): ...

            answer = calling(silent, "1")
            async with asyncio.timeout(LONG):
                await again.wait()
            answer.cancel()
            await asyncio.wait([answer])
            await asyncio.to_thread(workers.close_all)
            for writer in writers:
                writer.close()

    asyncio.run(act())
    assert "the result backend cannot be read: TimeoutError(); next try in 0.1 s" in caplog.text


def test_an_unforeseen_error_is_logged_and_answers_still_come(
    app: Celery, asked: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, fails = redis.asyncio.Redis.mget, iter([ValueError("unforeseen")])

    async def failing_once(*args: Any) -> Any:
        for error in fails:
            raise error
        return await read(*args)

    async def answered() -> Any:
        return await calling(asked, "1")

    monkeypatch.setattr(redis.asyncio.Redis, "mget", failing_once)
    app.backend.store_result("1", "here", "SUCCESS")
    assert asyncio.run(answered()) == "here"
    assert "unforeseen" in caplog.text
    assert "Traceback" in caplog.text


def test_an_answer_that_is_there_already_is_found_before_all_are_read_again(
    app: Celery, asked: Any
) -> None:
    app.backend.store_result("1", "here", "SUCCESS")

    async def answered() -> Any:
        async with asyncio.timeout(4):
            return await calling(asked, "1")

    assert asyncio.run(answered()) == "here"


def test_a_call_after_a_silence_is_answered_over_the_same_subscription(
    app: Celery, asked: Any, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    app.conf.redis_backend_health_check_interval = 0.05

    async def answered(task_id: str) -> Any:
        answer = calling(asked, task_id)
        await until(lambda: is_subscribed(app, client, task_id))
        app.backend.store_result(task_id, int(task_id), "SUCCESS")
        value = await answer
        await until(lambda: not is_subscribed(app, client, task_id))
        await asyncio.sleep(0.1)
        return value

    async def twice() -> list[Any]:
        return [await answered(task_id) for task_id in "12"]

    assert asyncio.run(twice()) == [1, 2]
    assert not caplog.records
