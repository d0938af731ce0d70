from __future__ import annotations

import dataclasses
import json

import pytest

from gw_celery.cluster import records

ONE = records.Facts(
    worker="gpu@one",
    serves="a,b",
    capacity=4,
    least=1,
    replicas=2,
    score=20.5,
    taken=7.5,
    life="abc",
    waiting=2.0,
    waiting_inputs=3,
    running_inputs=1,
    mean=2.5,
)


def test_facts_are_read_as_they_were_written() -> None:
    assert records.loads(ONE.dumps(12.3456)) == (ONE, 12.346)


def test_a_score_that_nobody_knows_is_none() -> None:
    unknown = dataclasses.replace(ONE, score=None)
    assert records.loads(unknown.dumps(1.0).encode())[0].score is None


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": "4"},
        {"worker": 7},
        {"at": None},
        {"taken": float("nan")},
        {"mean": None},
        {"waiting": True},
        {"taken": 10**400},
        {"capacity": 10**9},
    ],
)
def test_what_is_no_fact_is_refused(change: dict[str, object]) -> None:
    written = json.dumps(json.loads(ONE.dumps(1.0)) | change)
    with pytest.raises(ValueError, match=r"not a|more replicas"):
        records.loads(written)


@pytest.mark.parametrize("written", ["[]", "{", "7", '"gpu@one"'])
def test_what_is_no_document_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"not facts|JSON|Expecting"):
        records.loads(written)


def test_what_a_newer_version_adds_is_not_read() -> None:
    written = json.dumps(json.loads(ONE.dumps(1.0)) | {"colour": "red"})
    assert records.loads(written)[0] == ONE
