"""Texts of messages and errors that are too long, forge lines, or control a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import raising
import redis

from gw_celery import errors, testing
from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = pytest.mark.integration

SIZE = 3_000_000
FORGED = "\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged"
ODD = {
    "newline": FORGED,
    "escape": "\x1b[2J\x1b]0;title\x07",
    "nul": "a\x00b",
    "other": "\u2028\x85",
}


@pytest.fixture(scope="module")
def worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    with pooling.module_worker(redis_server, tmp_path_factory, module="raising") as started:
        yield started


@pytest.fixture
def added(worker: WorkerProcess) -> Iterator[list[str]]:
    """What the worker logs during the test, read at its end; nothing odd may be in it."""
    before, told = len(worker.log_text()), [""]
    yield told
    told[0] = added = worker.log.read_bytes().decode(errors="surrogateescape")[before:]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", added), added[:2000]
    assert not re.search(r"^\[2026-01-01", added, re.MULTILINE), added[:2000]
    assert len(added) < 100_000


def stored(server: testing.Server, task_id: str) -> int:
    with redis.Redis(unix_socket_path=str(server.socket), db=1) as client:
        keys = client.keys(f"*{task_id}")
        return sum(int(client.strlen(key)) for key in keys)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("task", ["fail", "plain"])
@pytest.mark.parametrize(
    "how", ["text", "key", "object", "bytes", "many", "lines", "escapes", "own text", "chained"]
)
def test_a_long_error_is_cut_where_it_is_stored_and_logged(
    worker: WorkerProcess, redis_server: testing.Server, task: str, how: str
) -> None:
    sent = getattr(raising, task).delay(how, SIZE)
    with pytest.raises(Exception) as raised:
        sent.get(timeout=30)
    assert raised.type.__name__ in ("ValueError", "KeyError", "OwnText", "RemoteTaskError")
    eventually(lambda: sent.id in worker.log_text(), 20)
    assert 0 < stored(redis_server, sent.id) < errors.LONGEST_TRACEBACK + 25 * errors.LONGEST_TEXT
    assert len(str(raised.value.args)) < 25 * errors.LONGEST_TEXT  # a class may write more itself


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("where", ["id", "task", "content type", "header", "queue"])
def test_control_characters_of_a_message_neither_forge_lines_nor_reach_the_terminal(
    worker: WorkerProcess, name: str, where: str
) -> None:
    odd = f"odd{ODD[name]}"
    send(where, odd)
    send(where, odd, is_ours=True)
    assert raising.fine.delay(1).get(timeout=20) == 1
    assert worker.exit_code is None


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("where", ["id", "task", "content type", "header"])
def test_a_huge_value_of_a_message_costs_little_log(worker: WorkerProcess, where: str) -> None:
    send(where, "x" * SIZE)
    send(where, "x" * SIZE, is_ours=True)
    assert raising.fine.delay(1).get(timeout=30) == 1
    assert worker.exit_code is None


def send(where: str, odd: str, *, is_ours: bool = False) -> None:
    """Send a message with an odd value, to a plain task's queue or to a service's."""
    queue = "cpu.fine" if is_ours else "celery"
    name = "raising.fine" if is_ours else "raising.plain"
    if where == "queue":
        pooling_command("add_consumer", queue=odd[:100])
        pooling_command("cancel_consumer", queue=odd[:100])
        return
    headers: dict[str, Any] = {
        "id": odd if where == "id" else "an-id",
        "task": odd if where == "task" else name,
        "lang": "py",
        "argsrepr": odd if where == "header" else "()",
        "origin": odd if where == "header" else "test",
    }
    content_type = odd if where == "content type" else "application/json"
    with raising.celery.connection_for_write() as connection:
        connection.Producer().publish(
            b"[[1], {}, null]",
            routing_key=queue,
            headers=headers,
            content_type=content_type,
            content_encoding="utf-8",
        )


def pooling_command(name: str, **arguments: Any) -> None:
    raising.celery.control.broadcast(name, arguments, reply=True, timeout=2)
