from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from gw_celery import conf, errors
from gw_celery.pool import dead_letter_message, dead_letters, dead_queue
from tests.processes import eventually
from tests.unit.pool import handmade

SETTINGS = conf.Settings(max_dead_letters=2, store_timeout=30.0)


class Room:
    """A dead-letter queue that can be away, or hang."""

    def __init__(self) -> None:
        self.held: list[dead_letter_message.Letter] = []
        self.tries = 0
        self.is_away = False
        self.is_free = threading.Event()
        self.is_free.set()

    def add(self, letter: dead_letter_message.Letter) -> bool:
        self.tries += 1
        assert self.is_free.wait(30)
        if self.is_away:
            raise ConnectionError("away")
        if len(self.held) >= 2:
            return False
        self.held.append(letter)
        return True


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    found = Room()
    monkeypatch.setattr(dead_queue, "of", lambda *_: found)
    monkeypatch.setattr(dead_letters, "_PAUSE", 0.01)
    monkeypatch.setattr(dead_letters, "_FAREWELL", 0.2)
    return found


@pytest.fixture
def office(room: Room) -> Iterator[dead_letters.DeadLetters]:
    with Celery("dead", broker="memory://", set_as_current=False) as app:
        opened = dead_letters.of(app, SETTINGS, "w@h")
        assert opened is not None
        yield opened
        room.is_free.set()
        opened.close()


def job(task_id: str) -> Any:
    message = SimpleNamespace(
        body=b"[]",
        content_type="application/json",
        content_encoding="utf-8",
        headers={"id": task_id, "task": "proj.embed"},
        properties={},
        delivery_info={},
    )
    return SimpleNamespace(message=message, name="proj.embed", task_id=task_id)


def test_a_letter_says_who_buried_it_and_why(office: dead_letters.DeadLetters, room: Room) -> None:
    office.bury(job("a"), "it killed", 3)
    eventually(lambda: room.held)
    summary = room.held[0].summary()
    assert (summary["worker"], summary["reason"], summary["deaths"]) == ("w@h", "it killed", 3)


def test_burying_never_waits_for_a_broker_that_hangs(
    office: dead_letters.DeadLetters, room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    room.is_free.clear()
    for number in range(dead_letters._LONGEST_QUEUE + 2):
        office.bury(job(f"n{number}"), "", 3)
    assert "has no dead letter: 100 others wait for the broker" in caplog.text
    office.close()
    assert "task proj.embed[n0] has no dead letter: the worker ends" in caplog.text


def test_a_letter_is_tried_again_while_the_broker_is_away(
    office: dead_letters.DeadLetters, room: Room
) -> None:
    room.is_away = True
    office.bury(job("a"), "", 3)
    eventually(lambda: room.tries > 2)
    room.is_away = False
    eventually(lambda: room.held)


def test_a_full_queue_is_one_line_with_the_task_and_the_remedy(
    office: dead_letters.DeadLetters, room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    for one in "abc":
        office.bury(job(one), "", 3)
    eventually(lambda: "is full" in caplog.text)
    (line,) = [one for one in caplog.messages if "is full" in one]
    assert "proj.embed[c]" in line
    assert "gw_max_dead_letters" in line
    assert "gw dead --requeue" in line


def test_a_message_that_cannot_be_read_harms_nobody(
    office: dead_letters.DeadLetters, caplog: pytest.LogCaptureFixture
) -> None:
    broken = job("a")
    broken.message.headers = {"compression": "no such"}
    office.bury(broken, "", 3)
    assert "task proj.embed[a] has no dead letter" in caplog.text


def test_none_switches_it_off() -> None:
    assert dead_letters.of(None, conf.Settings(dead_letter_queue=None), "w@h") is None


# -- which inputs are buried --


def killed_alone(pool: handmade.Pool, **given: Any) -> Any:
    child = handmade.Child()
    job = pool.start("a", child, is_redelivered=True, **given)
    pool.die(child)
    return job


def test_an_input_that_is_given_up_is_buried_once_with_its_deaths_and_fails() -> None:
    pool = handmade.Pool(max_deaths=2)
    pool.inputs._deaths.record([SimpleNamespace(task_id="a", runs_alone=False)])
    killed_alone(pool)
    assert pool.buried == []
    job = killed_alone(pool)
    assert pool.buried == [("a", 2)]
    assert pool.heard(job)[-1] is errors.PoisonedInput


def test_an_input_that_other_workers_saw_kill_is_buried_where_it_arrives() -> None:
    pool = handmade.Pool(shared=handmade.Shared(a=3))
    job = pool.submit("a", is_redelivered=True)
    pool.inputs.settle_asked(0.0)
    assert pool.buried == [("a", 3)]
    assert pool.heard(job) == [errors.PoisonedInput]


def test_an_input_that_is_lost_is_not_buried() -> None:
    pool = handmade.Pool()
    pool.start("a")
    pool.die(pool.children[0])
    assert pool.buried == []


def test_what_a_person_sent_again_has_no_deaths_here_until_it_is_redelivered() -> None:
    pool = handmade.Pool(max_deaths=2)
    again = {dead_letter_message.REQUEUED: True}
    pool.inputs._deaths.record([SimpleNamespace(task_id="a", runs_alone=True)])
    pool.start("a", headers=again)
    assert not pool.inputs._deaths.is_suspect("a")
    pool.die(pool.children[0])
    killed_alone(pool, headers=again)
    assert pool.buried == []
    killed_alone(pool, headers=again)
    assert pool.buried == [("a", 2)]
