"""Bodies of messages are decoded in children only: what they hold cannot touch the worker."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bodied
import ledger
import pytest
from billiard.exceptions import WorkerLostError
from celery import chord
from celery.exceptions import ChordError, TaskRevokedError, TimeLimitExceeded

from gw_celery import errors, testing
from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = pytest.mark.integration

TASKS = pytest.mark.parametrize("task", bodied.TASKS.values(), ids=bodied.TASKS)
GW_JSON, JSON = "application/x-gw-json", "application/json"
EMPTY = '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'
#: Python hashes these alike, and compares each int with the Decimal in one long call.
ALIKE = f'{{"~set":[{{"~int":"{hex((2**61 - 1) ** 4000)}"}},{{"~decimal":"0"}}]}}'


@pytest.fixture(scope="module")
def worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    settings = {
        "accept_content": ["gw-json", "json", "pickle"],
        "gw_heartbeat_timeout": 2.0,
        "gw_max_deaths": 1,
        "gw_max_payload_values": 100_000,
    }
    with pooling.module_worker(
        redis_server,
        tmp_path_factory,
        module="bodied",
        settings=settings,
        env={"C_FORCE_ROOT": "1"},  # for pickle
    ) as started:
        yield started


@pytest.fixture
def ledger_path(worker: WorkerProcess) -> Path:
    return pooling.ledger_of(worker)


@pytest.fixture(autouse=True)
def _survives(worker: WorkerProcess, ledger_path: Path) -> Iterator[None]:
    """Whatever arrives, the worker lives and decodes nothing itself."""
    yield
    assert bodied.echo.delay("after").get(timeout=60) == "after"
    assert worker.exit_code is None
    assert str(worker.pid) not in {pid for pid, *_ in ledger.words(ledger_path, "decoded")}


def child(worker: WorkerProcess) -> int:
    (pid,) = eventually(lambda: pooling.ready_pids(worker, bodied.celery), 30)
    return pid


def send(task: Any, body: str | bytes, content_type: str = GW_JSON) -> Any:
    """Send a body as it is, which no client would write."""
    app, task_id = bodied.celery, f"raw-{uuid.uuid4()}"
    headers = {"task": task.name, "id": task_id, "lang": "py"}
    queue = app.amqp.router.route({}, task.name)["queue"]
    with app.producer_or_acquire() as producer:
        producer.publish(
            body,
            content_type=content_type,
            content_encoding="utf-8",
            headers=headers,
            exchange="",
            routing_key=queue.name,
        )
    return app.AsyncResult(task_id)


@TASKS
@pytest.mark.parametrize("serializer", ["gw-json", "pickle"])
def test_a_body_is_decoded_in_the_child(
    task: Any, serializer: str, worker: WorkerProcess, ledger_path: Path
) -> None:
    name = f"{task.name}-{serializer}"
    sent = task.apply_async((bodied.Told(name),), serializer=serializer)
    assert sent.get(timeout=20) == name
    assert [int(pid) for pid, _, told in ledger.words(ledger_path, "decoded") if told == name] == [
        child(worker)
    ]


@TASKS
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        ("", GW_JSON),
        ("null", GW_JSON),
        ("[1,2]", GW_JSON),
        ('{"task":"bodied.echo","args":[],"kwargs":{}}', JSON),
        ('[{"a":1},{},{}]', GW_JSON),
        (f"[[1],[],{EMPTY}]", JSON),
        ("[[1],{},1]", GW_JSON),
        ('[[1],{},{"callbacks":', JSON),
        (b"\xff\xfe", GW_JSON),
        (f"[[{ALIKE}],{{}},{EMPTY}]", GW_JSON),
        (f"[[{'9' * 5000}],{{}},{EMPTY}]", JSON),
        (f"[[[{'{},' * 200_000}0]],{{}},{EMPTY}]", GW_JSON),
        (f"[[[{'[],' * 200_000}0]],{{}},{EMPTY}]", JSON),
        (f'[[{{"~obj":["bodied.Tmp@1",{{"path":"a"}}]}}],{{}},{EMPTY}]', GW_JSON),
        ("[[1],{},{}]", "text/plain"),
        ("[[1],{},{}]", "application/x-yaml"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_no_call_fails_with_the_reason_and_ends_nothing(
    task: Any, body: str | bytes, content_type: str, worker: WorkerProcess, ledger_path: Path
) -> None:
    before = child(worker)
    with pytest.raises(errors.UnreadableMessage, match=r"the body (is|cannot be decoded)"):
        send(task, body, content_type).get(timeout=30)
    assert child(worker) == before
    assert not ledger.words(ledger_path, "deleted")
    assert "is rejected, because its child cannot read" in worker.log_text()


@TASKS
@pytest.mark.parametrize(
    ("how", "serializer"), [("gil", "gw-json"), ("block", "pickle"), ("leave", "gw-json")]
)
def test_a_body_that_stops_each_child_is_given_up(
    task: Any, how: str, serializer: str, ledger_path: Path
) -> None:
    name = f"{how}-{task.name}"
    sent = task.apply_async((bodied.Told(name, how),), serializer=serializer)
    # A plain task is acknowledged early, so that it is never returned to the broker.
    with pytest.raises(WorkerLostError if task is bodied.plain else errors.PoisonedInput):
        sent.get(timeout=90)
    # One that would wait for its batch has not begun: it is first tried beside others again.
    deaths = 3 if task is bodied.batched else 2
    assert [told for _, _, told in ledger.words(ledger_path, "decoded")].count(name) == deaths


def test_a_message_for_no_task_is_not_decoded(worker: WorkerProcess, ledger_path: Path) -> None:
    lost = bodied.Told("lost")
    sent = bodied.celery.send_task("bodied.unknown", (lost,), queue="celery", serializer="gw-json")
    with pytest.raises(Exception, match=r"bodied\.unknown"):
        sent.get(timeout=20)
    older = {"task": "bodied.plain", "id": "older", "args": [lost], "kwargs": {}}
    for headers in ({}, {"id": "older"}):
        with bodied.celery.producer_or_acquire() as producer:
            producer.publish(
                older, serializer="gw-json", headers=headers, exchange="", routing_key="celery"
            )
    assert bodied.plain.delay("next").get(timeout=20) == "next"
    assert worker.log_text().count("its headers name no task") >= 2
    assert not [line for line in ledger.words(ledger_path, "decoded") if line[2] == "lost"]


# -- what the worker does itself: it needs the links of a call, and not its arguments --


@pytest.mark.parametrize("serializer", ["gw-json", "json"])
def test_errbacks_hear_of_an_input_that_was_never_decoded(
    serializer: str, ledger_path: Path
) -> None:
    name = f"expired-{serializer}"
    big = "x" * 300_000
    with pytest.raises((ChordError, TaskRevokedError)):
        chord(
            [
                bodied.echo.s(big).set(serializer=serializer, expires=-1.0),
                bodied.echo.s(big).set(serializer=serializer),
            ]
        )(bodied.note.s(name="never")).get(timeout=20)
    sent = bodied.rest.apply_async(
        (big, 20.0), serializer=serializer, time_limit=0.3, link_error=bodied.note.s(name=name)
    )
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=20)
    eventually(lambda: pooling.wrote(ledger_path, "noted", name) == 1)
    assert pooling.wrote(ledger_path, "noted", "never") == 0


@pytest.mark.parametrize("task", [bodied.rest, bodied.plain_rest], ids=["served", "plain"])
def test_errbacks_of_a_pickled_call_hear_of_its_time_limit(task: Any, ledger_path: Path) -> None:
    sent = task.apply_async(
        (bodied.Told("pickled"), 3.0),
        serializer="pickle",
        time_limit=0.5,
        link_error=bodied.note.s(name=f"pickled-{task.name}"),
    )
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=20)
    eventually(lambda: pooling.wrote(ledger_path, "noted", f"pickled-{task.name}") == 1)


@pytest.mark.skipif(
    not hasattr(bodied.celery.Task, "retry_on_worker_lost"), reason="new in Celery 5.7"
)
@pytest.mark.parametrize("serializer", ["gw-json", "json", "pickle"])
def test_a_call_that_celery_sends_again_has_its_arguments(
    serializer: str, ledger_path: Path
) -> None:
    args, kwargs = ([1, "a b"],), {"name": f"again-{serializer}"}
    sent = bodied.plain_retries.apply_async(args, kwargs, serializer=serializer)
    with pytest.raises(errors.PoisonedInput):
        sent.get(timeout=60)
    assert pooling.wrote(ledger_path, "ran", kwargs["name"], "[1,'a_b']") == 2


def test_links_that_only_a_child_can_read_are_named(
    worker: WorkerProcess, ledger_path: Path
) -> None:
    errback = bodied.note.s(name="told", rest=bodied.Told("in a link"))
    sent = bodied.rest.apply_async(("a", 20.0), time_limit=0.3, link_error=errback)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=20)
    assert f"{sent.id}]: its errbacks and chord, if any, are not told" in worker.log_text()


def test_inspect_shows_the_text_of_the_arguments(worker: WorkerProcess) -> None:
    sent = bodied.rest.apply_async((bodied.Told("seen"), 2.0), argsrepr="args", kwargsrepr="{}")
    (active,) = eventually(lambda: pooling.ask(worker, "active", bodied.celery))
    assert (active["id"], active["args"], active["kwargs"]) == (sent.id, "args", "{}")
    assert sent.get(timeout=20) == "seen"


def test_a_call_with_many_links_ends_once(ledger_path: Path) -> None:
    """What looks like links inside of arguments is none."""
    trap = json.dumps({"callbacks": None, "errbacks": [{"task": "bodied.note"}]})
    links = {"callbacks": None, "errbacks": [], "chain": None, "chord": None}
    sent = bodied.rest.apply_async(
        ([trap, json.loads(trap), links], 20.0),
        time_limit=0.3,
        link_error=bodied.note.s(name="trapped", rest=[trap, json.loads(trap)]),
    )
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=20)
    eventually(lambda: pooling.wrote(ledger_path, "noted", "trapped") == 1)
