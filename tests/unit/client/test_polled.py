from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import kombu.exceptions
from celery import states

from gw_celery import errors
from gw_celery.client import result_sources
from gw_celery.client.result_sources import PolledSource, RpcSource

INTERVAL = 0.001
LONG = 60.0


class Source:
    """A polled source over records of this test, and what it resolved."""

    def __init__(
        self, read: Callable[[str], Mapping[str, Any]], cls: type[PolledSource] = PolledSource
    ) -> None:
        self._waiters: dict[str, Future[Mapping[str, Any]]] = {}
        self.asked: list[str] = []
        self._read = read
        backend = types.SimpleNamespace(get_task_meta=self._ask)
        app = types.SimpleNamespace(_get_backend=lambda: backend)
        self.polled = cls(app, INTERVAL)

    async def wait_for(self, *task_ids: str) -> None:
        for task_id in task_ids:
            self._waiters[task_id] = Future()
            self.polled.add(task_id, self._waiters[task_id])
        assert self.polled._task is not None
        await asyncio.wait_for(self.polled._task, LONG)

    def _ask(self, task_id: str) -> Mapping[str, Any]:
        self.asked.append(task_id)
        return self._read(task_id)

    @property
    def resolved(self) -> dict[str, Any]:
        done = {task_id: waiter for task_id, waiter in self._waiters.items() if waiter.done()}
        return {task_id: waiter.exception() or waiter.result() for task_id, waiter in done.items()}


def success(task_id: str) -> Mapping[str, Any]:
    return {"status": states.SUCCESS, "result": task_id}


def test_a_backend_that_is_away_is_asked_ever_more_seldom_and_with_one_line_each(
    monkeypatch, caplog
) -> None:
    monkeypatch.setattr(result_sources, "LONGEST_DELAY", 0.004)
    monkeypatch.setattr(result_sources, "FIRST_DELAY", 0.001)
    failures = 0

    def read(task_id: str) -> Mapping[str, Any]:
        nonlocal failures
        failures += 1
        if failures <= 5:
            raise OSError("NOT_FOUND - no vhost")
        return success(task_id)

    source = Source(read)
    asyncio.run(source.wait_for(*"abc"))

    assert source.resolved.keys() == {"a", "b", "c"}
    # One a round, not one for each that waits, and no traceback.
    assert [record.exc_info for record in caplog.records] == [None] * 5
    delays = [record.args[1] for record in caplog.records]
    assert delays == [0.001, 0.002, 0.004, 0.004, 0.004]
    assert source.polled._backoff.next() == 0.001


def test_one_record_that_fails_keeps_no_other_from_being_read(monkeypatch) -> None:
    monkeypatch.setattr(result_sources, "FIRST_DELAY", 0.001)
    reads: list[str] = []

    def read(task_id: str) -> Mapping[str, Any]:
        reads.append(task_id)
        if task_id == "bad" and reads.count("bad") < 3:
            raise RuntimeError("of this record")
        return success(task_id)

    source = Source(read)
    asyncio.run(source.wait_for("bad", "a", "b"))

    assert reads == ["bad", "a", "b", "bad", "bad"]


def test_a_record_that_cannot_be_decoded_ends_the_wait_with_its_reason() -> None:
    def read(task_id: str) -> Mapping[str, Any]:
        raise kombu.exceptions.DecodeError("no such type")

    source = Source(read)
    asyncio.run(source.wait_for("a"))

    assert isinstance(source.resolved["a"], errors.SerializationError)
    assert "no such type" in str(source.resolved["a"])


def test_the_answer_of_another_task_that_cannot_be_decoded_ends_no_wait(monkeypatch) -> None:
    monkeypatch.setattr(result_sources, "FIRST_DELAY", 0.001)
    slurped: list[str] = []

    def read(task_id: str) -> Mapping[str, Any]:
        slurped.append(task_id)
        if len(slurped) == 1:
            raise kombu.exceptions.DecodeError("of another task in the queue")
        return success(task_id)

    source = Source(read, RpcSource)
    asyncio.run(source.wait_for("a"))

    assert source.resolved == {"a": success("a")}
