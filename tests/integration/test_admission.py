"""Inputs that wait for too long: refused by a worker, and before they are sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import weighed
from celery import Celery, chord
from celery.exceptions import ChordError, TaskRevokedError

import gw_celery as gw
from gw_celery import testing
from tests import pooling, services
from tests.conftest import needed
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

LONG = 2 * weighed.LIMIT
#: Seconds ago that are too long, whatever the worker does.
LATE = 60.0
Send = Callable[..., Any]


@pytest.fixture(scope="module")
def worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    with pooling.module_worker(redis_server, tmp_path_factory, module="weighed") as started:
        yield started


@pytest.fixture(scope="module")
def rabbitmq_url() -> Iterator[str]:
    """Of its own: in the virtual host of the other tests the same queues have no priorities."""
    with needed(services.rabbitmq_vhost()) as url:
        yield url


@pytest.fixture
def ledger_path(worker: WorkerProcess) -> Path:
    return pooling.ledger_of(worker)


def send(name: str, *args: Any, age: float = 0.0, app: Celery = weighed.celery, **options: Any):
    """Send an input that has waited for ``age`` seconds; only the worker can refuse it."""
    headers = {"gw-enqueued": time.time() - age}
    options = {"queue": f"cpu.{name}", "headers": headers, **options}
    return app.send_task(f"weighed.{name}", args, **options)


def refusal(sent: Any) -> gw.QueueTimeExceeded:
    with pytest.raises(gw.QueueTimeExceeded) as raised:
        sent.get(timeout=20)
    return raised.value


@pytest.mark.parametrize("name", ["patient", "hasty"])
def test_an_input_that_comes_too_late_is_refused_and_done_with(
    worker: WorkerProcess, ledger_path: Path, redis_server: testing.Server, name: str
) -> None:
    late = send(name, f"late-{name}", age=LATE, link_error=weighed.note.s(name=name))
    found = refusal(late)
    assert found.task == f"weighed.{name}"
    assert (found.queue, found.limit) == (f"cpu.{name}", weighed.LIMIT)
    assert found.estimate > LATE - 1
    assert found.was_sent
    assert late.state == "FAILURE"
    assert send(name, f"soon-{name}").get(timeout=20) == f"soon-{name}"
    eventually(lambda: pooling.wrote(ledger_path, "errback", name) == 1)
    assert pooling.began(ledger_path, f"late-{name}") == []
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as client:
        eventually(lambda: client.hlen("unacked") == 0)


def test_an_input_that_waited_for_a_slot_is_refused_when_it_gets_one(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    long = send("patient", "long", LONG)
    eventually(lambda: pooling.began(ledger_path, "long"))
    late = send("patient", "behind-it")
    assert refusal(late).estimate > weighed.LIMIT
    assert long.get(timeout=20) == "long", "what has begun is never too late"
    assert pooling.began(ledger_path, "behind-it") == []


def test_an_input_that_waited_for_a_batch_is_refused_before_it_joins(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    long = send("one_by_one", "long-batch", LONG)
    eventually(lambda: pooling.began(ledger_path, "long-batch"))
    late, expired = (
        send("one_by_one", "late-batch", 0.0),
        send("one_by_one", "expired-batch", 0.0, expires=weighed.LIMIT / 2),
    )
    assert refusal(late).estimate > weighed.LIMIT
    assert long.get(timeout=20) == "long-batch"
    assert pooling.began(ledger_path, "late-batch") == []
    with pytest.raises(TaskRevokedError):
        expired.get(timeout=20)
    assert pooling.began(ledger_path, "expired-batch") == []


def test_what_has_expired_is_revoked_as_in_celery_and_not_too_late(worker: WorkerProcess) -> None:
    with pytest.raises(TaskRevokedError):
        send("patient", "expired", age=LATE, expires=-1).get(timeout=20)


def test_a_chord_learns_that_one_of_its_inputs_was_refused(worker: WorkerProcess) -> None:
    long = send("patient", "long", LONG)
    header = [weighed.patient.s("late"), weighed.single.s("well")]
    body = chord(header, app=weighed.celery)(weighed.headers_of.s())
    with pytest.raises((ChordError, gw.QueueTimeExceeded)):
        body.get(timeout=20)
    assert long.get(timeout=20) == "long"
    # The caller may hear of the part before Celery has stored what becomes of the body.
    eventually(lambda: body.state == "FAILURE")


def test_what_is_for_later_is_not_late_and_a_retry_waits_anew(worker: WorkerProcess) -> None:
    later = weighed.patient.apply_async(("later",), countdown=weighed.LIMIT + 1)
    tried = weighed.patiently_tried.delay()
    assert later.get(timeout=20) == "later"
    assert tried.get(timeout=20) == 1


def test_a_message_without_the_header_is_never_late(worker: WorkerProcess) -> None:
    assert send("patient", "foreign", headers={}).get(timeout=20) == "foreign"


def test_a_time_of_hundreds_of_digits_breaks_nothing(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    long = send("patient", "before-it", 1.0, headers={})
    eventually(lambda: pooling.began(ledger_path, "before-it"))
    odd = send("patient", "odd-time", headers={"gw-enqueued": 10**400})
    after = send("patient", "after-it", headers={})
    assert [one.get(timeout=20) for one in (long, odd, after)] == [
        "before-it",
        "odd-time",
        "after-it",
    ]
    assert worker.exit_code is None


def test_callers_are_refused_while_the_queue_is_too_long_and_let_in_again(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    assert send("patient", "first", 0.3).get(timeout=20) == "first"
    sent = [send("patient", f"flood-{one}", 0.3, age=-LATE) for one in range(20)]
    found = eventually(lambda: _refused(weighed.patient), 20)
    assert found.estimate > weighed.LIMIT
    assert not found.was_sent
    assert pooling.began(ledger_path, "refused") == []
    assert weighed.single.delay("others").get(timeout=20) == "others"
    assert [one.get(timeout=60) for one in sent] == [f"flood-{one}" for one in range(20)]
    eventually(lambda: _refused(weighed.patient) is None, 20)


def _refused(task: Any) -> gw.QueueTimeExceeded | None:
    """How sending an input, which has expired, is refused."""
    try:
        task.apply_async(("refused",), expires=-1)
    except gw.QueueTimeExceeded as refused:
        return refused
    return None


# -- before a worker comes --


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_what_matters_more_starts_first(
    kind: str, request: pytest.FixtureRequest, start_worker: StartWorker, tmp_path: Path
) -> None:
    result = request.getfixturevalue("result_url")
    # Of Redis another database: the module's worker would take them one by one.
    broker = request.getfixturevalue(f"{kind}_url").replace("virtual_host=0", "virtual_host=7")
    ledger_path = tmp_path / "priorities"
    names = [f"priority {one}" for one in (9, 0, 6, 3)]
    with pooling.client(broker, result) as app:
        app.conf.task_queue_max_priority = 10
        sent = [send("single", name, app=app, priority=int(name.split()[1])) for name in names]
        pooling.start(start_worker, ledger_path, broker=broker, result=result, module="weighed")
        assert [one.get(timeout=30) for one in sent] == names
    began = [line.split()[-1] for line in ledger_path.read_text().splitlines() if "began" in line]
    # To Redis 0 matters most, to RabbitMQ the largest.
    assert began == (["0", "3", "6", "9"] if kind == "redis" else ["9", "6", "3", "0"])


def test_callers_are_told_of_what_waits_in_rabbitmq_by_way_of_the_results_redis(
    rabbitmq_url: str, result_url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = pooling.start(
        start_worker, tmp_path / "told", broker=rabbitmq_url, result=result_url, module="weighed"
    )
    with pooling.client(rabbitmq_url, result_url) as app:
        app.conf.task_queue_max_priority = 10
        assert send("patient", "first", 0.3, app=app).get(timeout=20) == "first"
        sent = [send("patient", f"{one}", 0.3, app=app, age=-LATE) for one in range(40)]

        @gw.App("told", app).remote(queue="cpu.patient", name="weighed.patient", max_queue_time=0.1)
        async def told(name: str) -> None: ...

        # What the worker itself holds would be done in a fraction of that.
        eventually(lambda: (found := _refused(told)) and found.estimate > 20 * 0.3, 20)
        for one in sent:
            one.revoke()
        eventually(lambda: _refused(told) is None, 20)
    worker.stop()


def test_rabbitmq_refuses_at_reception_and_publishes_nothing_without_redis(
    rabbitmq_url: str, result_url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    for number, result in enumerate((result_url, "rpc://")):
        ledger_path = tmp_path / f"ledger-{number}"
        worker = pooling.start(
            start_worker, ledger_path, broker=rabbitmq_url, result=result, module="weighed"
        )
        with pooling.client(rabbitmq_url, result) as app:
            app.conf.task_queue_max_priority = 10
            assert refusal(send("patient", "late", app=app, age=LATE)).was_sent
            assert send("patient", "soon", app=app).get(timeout=20) == "soon"
        assert pooling.began(ledger_path, "late") == []
        worker.stop()
