from __future__ import annotations

import dataclasses
import json

import pytest

from gw_celery.protocol import snapshot, worker_record
from gw_celery.protocol.worker_record import QueueLoad, ServiceRecord, Size, WorkerRecord

SERVICE = ServiceRecord(
    queues="gpu.A100.a",
    slots=8,
    score=20.5,
    taken=7.5,
    waiting=2.0,
    waiting_inputs=3,
    running_inputs=1,
    mean=2.5,
)
RECORD = WorkerRecord(
    worker="gpu@one",
    incarnation="gpu@one:abc.0",
    size=Size(least=1, capacity=4, replicas=2),
    services={"a": SERVICE, "": ServiceRecord()},
    loads={"gpu.A100.a": QueueLoad(waiting=3.0, rate=None), "b": QueueLoad(rate=1.5)},
)


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        WorkerRecord(worker="gpu@one"),
        dataclasses.replace(RECORD, size=None),
        dataclasses.replace(RECORD, size=Size()),
    ],
)
def test_a_record_is_read_as_it_was_written(record: WorkerRecord) -> None:
    assert worker_record.loads(record.dumps(), record.incarnation) == record
    assert worker_record.loads(record.dumps().encode(), record.incarnation) == record


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"worker": 7},
        {"size": [0, "4", 0]},
        {"size": [0, 10**9, 0]},
        {"size": [0, 4]},
        {"size": 4},
        {"services": []},
    ],
)
def test_what_cannot_be_true_is_refused(change: dict[str, object]) -> None:
    written = json.dumps(json.loads(RECORD.dumps()) | change)
    with pytest.raises(ValueError, match=r"not a|more than"):
        worker_record.loads(written)


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("services", 1),
        ("services", ["q", 8, None, float("nan"), 0.0, 0, 0, 1.0]),
        ("services", ["q", 8, None, 10**400, 0.0, 0, 0, 1.0]),
        ("services", ["q", 8, None, 0.0, True, 0, 0, 1.0]),
        ("services", ["q", 8, None, 0.0, 0.0, 0, 0, None]),
        ("services", [1, 8, None, 0.0, 0.0, 0, 0, 1.0]),
        ("services", ["q"]),
        ("services", None),
        ("loads", [0.0, "fast", 1.0]),
        ("loads", [1e300, None, 1.0]),
        ("loads", {}),
    ],
)
def test_a_service_or_queue_that_cannot_be_read_is_left_out_alone(field: str, part: object) -> None:
    told = json.loads(RECORD.dumps())
    told[field]["odd"] = part
    read = worker_record.loads(json.dumps(told), RECORD.incarnation)
    assert read == dataclasses.replace(RECORD, unreadable=("odd",))


@pytest.mark.parametrize("written", ["[]", "{", "7", '"gpu@one"', "{}"])
def test_what_is_no_record_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"not a|JSON|Expecting"):
        worker_record.loads(written)


def test_what_a_newer_version_adds_is_not_read() -> None:
    told = json.loads(RECORD.dumps())
    told["colour"] = "red"
    told["services"]["a"].append("red")
    assert worker_record.loads(json.dumps(told), "gpu@one:abc.0") == RECORD


def test_a_record_tells_what_the_worker_has_and_what_it_gave_back_is_not_taken() -> None:
    counters = snapshot.Counters(
        arrived=10.0, given_back=4.0, waiting=2.0, waiting_inputs=1, running_inputs=3, mean=2.0
    )
    worker = snapshot.Worker(
        hostname="gpu@one",
        ready_slots={"a": 8},
        tallies={"a": counters},
        scores={"a": snapshot.Score(value=5.0)},
    )
    record = worker_record.of(worker, {"a": ["q"], "": []}, None, {})
    assert record.serves == ",a"
    assert record.services[""] == ServiceRecord()
    assert record.services["a"] == ServiceRecord(
        queues="q",
        slots=8,
        score=5.0,
        taken=6.0,
        waiting=2.0,
        waiting_inputs=1,
        running_inputs=3,
        mean=2.0,
    )
