from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gw_celery.cluster import early_acks
from gw_celery.replica import early_ack_records
from gw_celery.replica import input as replica_input


class Backend:
    """Groups what it writes, and can be away."""

    def __init__(self) -> None:
        self.task_keyprefix = b"celery-task-meta-"
        self.said: list[tuple[Any, ...]] = []
        self.is_away = False

    async def command(self, *command: Any) -> None:
        self.said.append(command)
        if self.is_away:
            raise ConnectionError("away")


Backend.task_keyprefix = "celery-task-meta-"  # type: ignore[attr-defined]

TASKS = {"early": SimpleNamespace(acks_late=False), "late": SimpleNamespace(acks_late=True)}
INPUT = replica_input.Input(7, "early", "a", link=None)
REQUEST = {"id": "a", "task": "early"}


def app(backend: Any) -> Any:
    return SimpleNamespace(backend=backend, tasks=TASKS)


def made(backend: Backend) -> early_ack_records.Records:
    found = early_ack_records.of(app(backend), "w@h:1")
    assert found is not None
    return found


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_only_tasks_that_are_acknowledged_early_have_records() -> None:
    records = made(Backend())
    assert [records.has(name) for name in ("early", "late", "unknown")] == [True, False, False]


def test_a_record_is_there_while_its_input_runs() -> None:
    backend = Backend()
    records = made(backend)

    async def live() -> None:
        await records.begin(INPUT, REQUEST, ([], {}, {"errbacks": [{"task": "note"}]}))
        records.end(8)  # has none
        records.end(7)
        records.end(7)
        await turns()

    asyncio.run(live())
    (put, key, number, record), removed = backend.said
    assert (put, key, number) == ("hset", "gw:early:w@h:1", "7")
    assert early_acks.read(record)["errbacks"] == [{"task": "note"}]
    assert removed == ("hdel", key, "7")


def test_without_redis_an_input_starts_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    backend.is_away = True
    records = made(backend)

    async def live() -> None:
        await records.begin(INPUT, REQUEST, ([], {}, None))
        records.end(7)
        await turns()

    asyncio.run(live())
    assert "early[a] starts without a record" in caplog.text
    assert "the record of input 7 stays" in caplog.text


def test_callbacks_that_cannot_be_written_cost_their_record_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Backend()
    asyncio.run(made(backend).begin(INPUT, REQUEST, ([], {}, {"chord": object()})))
    assert early_acks.read(backend.said[0][3])["chord"] is None
    assert "has callbacks that cannot be recorded" in caplog.text


def test_nothing_is_recorded_that_would_not_be_looked_for() -> None:
    assert early_ack_records.of(app(Backend()), None) is None
    assert early_ack_records.of(app(SimpleNamespace()), "w@h:1") is None
