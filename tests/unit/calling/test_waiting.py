"""Waiting for answers with a backend that has to be asked; Redis is in the integration tests."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from celery import states
from celery.backends import cache

import gw_celery as gw
from gw_celery.calling import waiting

LONG = 60.0


@pytest.fixture
def square(app: gw.App) -> Any:
    app.celery.conf.gw_poll_interval = 0.001
    cache._DUMMY_CLIENT_CACHE.clear()  # Celery's in-memory backend is one for the process

    @app.remote
    async def square(x): ...

    yield square
    watcher = waiting._watchers.pop(id(app.celery), None)
    if watcher is not None:
        watcher.close()


def answer(task: Any, task_id: str, result: Any, state: str = states.SUCCESS) -> None:
    """Answer a call as its worker would."""
    task.backend.store_result(task_id, result, state, traceback="the remote traceback")


def revoked(task: Any, monkeypatch) -> list[str]:
    ids: list[str] = []
    monkeypatch.setattr(task.app.control, "revoke", lambda task_id, *_, **__: ids.append(task_id))
    return ids


def test_an_answer_is_awaited(square) -> None:
    async def main() -> Any:
        calling = asyncio.ensure_future(square.options(task_id="1").aremote(5))
        await asyncio.sleep(0)
        answer(square, "1", 25)
        return await calling

    assert asyncio.run(main()) == 25


def test_an_answer_that_is_there_already_is_found(square) -> None:
    answer(square, "1", (1, 2))

    async def main() -> Any:
        return await square.options(task_id="1").spawn(5)

    assert asyncio.run(main()) == (1, 2)


def test_an_error_is_raised_with_the_remote_traceback(square) -> None:
    answer(square, "1", ValueError("bad", 3), states.FAILURE)

    async def main() -> Any:
        await square.options(task_id="1")(5)

    with pytest.raises(ValueError, match="bad") as caught:
        asyncio.run(main())
    assert caught.value.args == ("bad", 3)
    assert "the remote traceback" in str(caught.value.__cause__)


def test_many_calls_wait_in_one_thread(square) -> None:
    before = threading.active_count()

    async def main() -> list[Any]:
        sent = [square.apply_async((n,), task_id=str(n)) for n in range(300)]
        waits = [asyncio.ensure_future(waiting.answer(one, "square", LONG)) for one in sent]
        await asyncio.sleep(0)
        assert threading.active_count() == before + 1
        for n in range(300):
            answer(square, str(n), n * n)
        return await asyncio.gather(*waits)

    assert asyncio.run(main()) == [n * n for n in range(300)]


def test_two_that_wait_for_one_answer_both_get_it(square) -> None:
    async def main() -> list[Any]:
        sent = square.apply_async((5,), task_id="1")
        waits = [asyncio.ensure_future(waiting.answer(sent, "square", LONG)) for _ in range(2)]
        await asyncio.sleep(0)
        answer(square, "1", 25)
        return await asyncio.gather(*waits)

    assert asyncio.run(main()) == [25, 25]


def test_a_call_that_is_not_answered_in_time_is_revoked(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)

    async def main() -> None:
        await square.options(task_id="1", timeout=0.01)(5)

    with pytest.raises(gw.CallTimeout) as caught:
        asyncio.run(main())
    assert "square[1] was not answered within 0.01 s and was revoked" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    waiting._watchers[id(square.app)]._publishers.shutdown(wait=True)
    assert ids == ["1"]


def test_a_wait_that_is_cancelled_revokes_the_call(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)

    async def main() -> None:
        sent = square.apply_async((5,), task_id="1")
        calling = asyncio.ensure_future(waiting.answer(sent, "square", None))
        await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait([calling])
        assert calling.cancelled()

    asyncio.run(main())
    watcher = waiting._watchers[id(square.app)]
    watcher._publishers.shutdown(wait=True)
    assert ids == ["1"]


def test_too_many_that_wait_are_refused(square) -> None:
    square.app.conf.gw_max_waiting = 1

    watcher = waiting.watcher(square.app)

    async def both() -> list[Any]:
        waits = [asyncio.ensure_future(watcher.meta(one)) for one in ("1", "2")]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        answer(square, "1", 1)
        return await asyncio.gather(*waits, return_exceptions=True)

    first, second = asyncio.run(both())
    assert first["result"] == 1
    assert isinstance(second, gw.UsageError)
    assert "gw_max_waiting" in str(second)


def test_a_blocking_call_that_is_not_answered_in_time_is_revoked(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)

    with pytest.raises(gw.CallTimeout, match="was revoked"):
        square.options(task_id="1", timeout=0.01).remote(5)
    assert ids == ["1"]


def test_a_blocking_call_returns_what_was_answered(square) -> None:
    answer(square, "1", 25)

    assert square.options(task_id="1").remote(5) == 25
    sent = square.options(task_id="1").spawn(5)
    assert (sent.id, sent.get()) == ("1", 25)
    assert repr(sent) == f"<Spawned {square.name}[1]>"


def test_a_spawned_call_can_be_cancelled(square, monkeypatch) -> None:
    ids = revoked(square, monkeypatch)
    square.options(task_id="1").spawn(5).cancel()

    assert ids == ["1"]
