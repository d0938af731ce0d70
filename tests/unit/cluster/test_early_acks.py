from __future__ import annotations

import pytest

from gw_celery import errors
from gw_celery.cluster import early_acks

REQUEST = {
    "id": "a",
    "task": "proj.embed",
    "group": "g",
    "argsrepr": "(...)",
    "ignore_result": None,
}


def test_a_record_holds_who_waits_and_not_what_it_was_called_with() -> None:
    errback = {"task": "proj.note", "args": [1], "options": {}}
    embed = {"errbacks": [errback], "chord": None, "chain": [errback], "callbacks": [errback]}
    kept = early_acks.read(early_acks.write(REQUEST, embed))
    assert (kept["id"], kept["task"], kept["group"]) == ("a", "proj.embed", "g")
    assert (kept["errbacks"], kept["chain"], kept["chord"]) == ([errback], [errback], None)
    assert "argsrepr" not in kept
    assert "callbacks" not in kept


@pytest.mark.parametrize("embed", [None, [], "odd"])
def test_a_message_without_options_has_a_record(embed: object) -> None:
    assert early_acks.read(early_acks.write(REQUEST, embed))["errbacks"] is None


def test_callbacks_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(errors.SerializationError):
        early_acks.write(REQUEST, {"chord": object()})


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"id": 1}', b"\xff"])
def test_what_is_no_record_is_refused(record: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        early_acks.read(record)


def test_who_takes_over_knows_whose_it_was_also_the_second_time() -> None:
    number = early_acks.taken_over("w@h:1", "7")
    assert early_acks.lost_worker(number) == "w@h:1"
    assert early_acks.taken_over("other@h:2", number) == number
    assert early_acks.lost_worker("7") is None
    assert early_acks.node("w@h:1") == "w@h"


def test_keys_have_the_prefix_of_the_results() -> None:
    class Backend:
        task_keyprefix = "celery-task-meta-"

    backend = Backend()
    backend.task_keyprefix = b"mine_celery-task-meta-"  # type: ignore[assignment]
    assert early_acks.records_key(backend, "w@h:1") == "mine_gw:early:w@h:1"


def test_a_worker_that_was_taken_for_lost_keeps_its_records() -> None:
    assert early_acks.start_of("w@my.host:1.0") == early_acks.start_of("w@my.host:1.17")
    assert early_acks.start_of("w@my.host:1.0") == "w@my.host:1"
