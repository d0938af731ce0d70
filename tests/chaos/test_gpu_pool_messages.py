"""Messages that no worker can run reach a worker on the GPU pool: it rejects them and goes on."""

from __future__ import annotations

import bz2
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooled
import pytest
from celery import states

from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

Publish = Callable[..., str]


@pytest.fixture
def publish(pooled_worker: WorkerProcess) -> Publish:
    """Put a message of any shape on a queue of the worker; its task id."""

    def put(body: bytes, queue: str = "cpu.add", task: str = "pooled.add", **options: Any) -> str:
        task_id = str(uuid.uuid4())
        headers = {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "retries": 0}
        given = {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "headers": headers,
            "correlation_id": task_id,
            "routing_key": queue,
            **options,
        }
        with pooled.celery.connection_for_write() as connection:
            connection.Producer().publish(body, **given)
        return task_id

    return put


BODIES = {
    "number": b"42",
    "text": b'"text"',
    "null": b"null",
    "empty list": b"[]",
    "one entry": b"[[]]",
    "two entries": b"[[], {}]",
    "four entries": b"[[], {}, {}, {}]",
    "mapping": b'{"a": 1}',
    "wrong entries": b"[1, 2, 3]",
    "no json": b"\xff\xfe{",
    "deep": b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize(("queue", "task"), [("cpu.add", "pooled.add"), ("celery", "pooled.plain")])
def test_a_body_that_is_no_call_is_rejected(
    name: str, queue: str, task: str, publish: Publish, pooled_worker: WorkerProcess
) -> None:
    task_id = publish(BODIES[name], queue, task)
    assert pooled.add.delay(1).get(timeout=20) == 2
    assert pooled.plain.delay(1).get(timeout=20) == 2
    assert pooled_worker.exit_code is None
    eventually(lambda: task_id not in str(pooling.ask(pooled_worker, "reserved")))


CONTENTS = {
    "unknown": {"content_type": "application/x-unheard-of"},
    "pickle": {"content_type": "application/x-python-serialize", "content_encoding": "binary"},
    "compressed": {"compression": "gzip"},
    "no headers": {"headers": {}},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_message_in_a_content_that_is_not_accepted_is_rejected(
    name: str, publish: Publish, pooled_worker: WorkerProcess
) -> None:
    body = b"[[1], {}, {}]" if name in ("unknown", "no headers") else b"\x80\x04}\x94."
    publish(body, **CONTENTS[name])
    assert pooled.add.delay(1).get(timeout=20) == 2
    assert pooled_worker.exit_code is None


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(lambda put: put(b"42"), id="body"),
        pytest.param(lambda put: put(b"\xff\xfe{"), id="json"),
        pytest.param(lambda put: put(b"x", content_type="application/x-unheard-of"), id="content"),
        pytest.param(lambda put: put(b"[[1], {}, {}]", task="pooled.unheard"), id="task"),
        pytest.param(lambda put: put(b"[1, 2, 3]"), id="entries"),
        pytest.param(lambda put: put(b"[[1], [], null]"), id="keywords"),
        pytest.param(lambda put: put(b"[[1, 2, 3, 4], {}, {}]"), id="arguments"),
    ],
)
def test_a_caller_that_waits_for_a_message_that_cannot_run_gets_a_failure(
    send: Callable[[Publish], str], publish: Publish
) -> None:
    result = pooled.celery.AsyncResult(send(publish))
    eventually(lambda: result.state == states.FAILURE)
    assert isinstance(result.result, Exception)
    assert "WorkerLost" not in repr(result.result)


def test_a_rejected_message_is_not_delivered_again(
    publish: Publish, pooled_worker: WorkerProcess
) -> None:
    task_id = publish(b"[1]")
    eventually(lambda: task_id in pooled_worker.log_text())
    assert pooled.add.delay(1).get(timeout=20) == 2
    stats = pooling.ask(pooled_worker, "stats")
    assert stats["pid"] == pooled_worker.pid
    # What just ended may be listed for the moment until its message is acknowledged.
    eventually(lambda: pooling.ask(pooled_worker, "reserved") == [])


def bomb(mebibytes: int) -> bytes:
    """A body of so many zeros, compressed to a kilobyte."""
    compressor = bz2.BZ2Compressor()
    return b"".join(compressor.compress(bytes(2**20)) for _ in range(mebibytes)) + (
        compressor.flush()
    )


def peak_mebibytes(pid: int) -> int:
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(peak) // 1024


def test_a_decompression_bomb_is_refused_with_flat_memory(
    publish: Publish, pooled_worker: WorkerProcess
) -> None:
    body, task_id, before = bomb(400), str(uuid.uuid4()), peak_mebibytes(pooled_worker.pid)
    assert len(body) < 1024
    headers = {
        "lang": "py",
        "task": "pooled.add",
        "id": task_id,
        "compression": "application/x-bz2",
    }
    publish(body, headers=headers)
    answer = pooled.celery.AsyncResult(task_id)
    eventually(lambda: answer.state == states.FAILURE, 20)
    assert "and a worker takes 67108864: send large data by reference" in str(answer.result)
    assert peak_mebibytes(pooled_worker.pid) - before < 200
    assert pooled.add.delay(1).get(timeout=20) == 2
