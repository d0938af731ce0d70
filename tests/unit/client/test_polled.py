"""Waiting with a result backend that has to be asked, and that fails."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import kombu.exceptions
import pytest
from celery import Celery, states
from celery.backends.cache import CacheBackend
from celery.backends.rpc import RPCBackend

import gw_celery as gw
from gw_celery import errors
from gw_celery.testing import workers

LONG = 60.0
Read = Callable[[str], Mapping[str, Any]]


class Scripted(CacheBackend):
    """Reads what a test says."""

    read: ClassVar[Read]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, backend="memory://", **kwargs)

    def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
        return Scripted.read(task_id)


class ScriptedQueue(RPCBackend):
    def get_task_meta(self, task_id: str, backlog_limit: int = 1000) -> Any:
        return Scripted.read(task_id)


def task_of(backend: type[Any], read: Read) -> Any:
    Scripted.read = staticmethod(read)
    url = f"{backend.__module__}:{backend.__name__}"
    app = Celery("polled", broker="memory://", backend=url, set_as_current=False)
    gw.preset(app)
    app.conf.gw_poll_interval = 0.001

    @gw.App("polled", app).remote
    async def asked(): ...

    return asked


@pytest.fixture(autouse=True)
def _watchers_end_with_their_test() -> Iterator[None]:
    yield
    workers.close_all()


def answers(task: Any, *task_ids: str) -> list[Any]:
    async def main() -> list[Any]:
        sent = [task.options(task_id=task_id, timeout=LONG).spawn() for task_id in task_ids]
        return await asyncio.gather(*sent, return_exceptions=True)

    return asyncio.run(main())


def success(task_id: str) -> Mapping[str, Any]:
    return {"status": states.SUCCESS, "result": task_id}


def delays(caplog: pytest.LogCaptureFixture) -> list[float]:
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("gw_")]
    return [float(re.findall(r"next try in (\S+) s", text)[0]) for text in texts]


def test_a_backend_that_is_away_is_asked_ever_more_seldom_and_with_one_line_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = iter(range(4))

    def read(task_id: str) -> Mapping[str, Any]:
        if next(failures, None) is not None:
            raise OSError("NOT_FOUND - no vhost")
        return success(task_id)

    task = task_of(Scripted, read)
    assert answers(task, *"abc") == [*"abc"]
    # One a round, not one for each that waits, and no traceback.
    assert delays(caplog) == [0.1, 0.2, 0.4, 0.8]
    assert {record.exc_info for record in caplog.records} == {None}
    failures = iter(range(1))
    assert answers(task, "d") == ["d"]
    assert delays(caplog)[4:] == [0.1]


def test_one_record_that_fails_keeps_no_other_from_being_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reads: list[str] = []

    def read(task_id: str) -> Mapping[str, Any]:
        reads.append(task_id)
        if task_id == "bad" and not {*"ab"} <= {*reads}:
            raise RuntimeError("of this record")
        return success(task_id)

    assert answers(task_of(Scripted, read), "bad", "a", "b") == ["bad", "a", "b"]
    assert "the result of bad cannot be read: " in caplog.text


@pytest.mark.parametrize(
    "exc", [kombu.exceptions.DecodeError("no such type"), kombu.exceptions.ContentDisallowed("no")]
)
def test_a_record_that_cannot_be_decoded_ends_the_wait_with_its_reason(exc: Exception) -> None:
    def read(task_id: str) -> Mapping[str, Any]:
        raise exc

    (error,) = answers(task_of(Scripted, read), "a")
    assert isinstance(error, errors.SerializationError)
    assert str(exc) in str(error)


def test_the_answer_of_another_task_that_cannot_be_decoded_ends_no_wait() -> None:
    reads: list[str] = []

    def read(task_id: str) -> Mapping[str, Any]:
        reads.append(task_id)
        if len(reads) == 1:
            raise kombu.exceptions.DecodeError("of another task in the queue")
        return success(task_id)

    assert answers(task_of(ScriptedQueue, read), "a") == ["a"]
