"""What logs, events, ``inspect`` and so Flower show of arguments and answers."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import MaxRetriesExceededError

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

SECRET = "the prompt of a patient"
POOLS = ["gw_celery.pool:TaskPool", "prefork", "solo"]
Start = Callable[..., tuple[WorkerProcess, Any]]


@pytest.fixture
def start(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a worker that sends events, on this pool and with these settings.

    It returns the module ``shy`` with the same settings, too.
    """

    def started(pool: str, **settings: Any) -> tuple[WorkerProcess, Any]:
        env = {"POOL": pool, "SETTINGS": json.dumps(settings)}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        worker = start_worker("shy:celery", queues="cpu,celery", extra_args=["-E"])
        monkeypatch.delitem(sys.modules, "shy", raising=False)
        return worker, importlib.import_module("shy")

    return started


def is_over(seen: list[Any], task_id: str) -> bool:
    """Whether the worker has told the end of a task."""
    ends = ("task-succeeded", "task-failed")
    return any(event["type"] in ends and event.get("uuid") == task_id for event in seen)


def sends(shy: Any, text: str) -> dict[str, Callable[[], Any]]:
    """All ways to call a task with ``text``; each returns what the caller gets."""
    return {
        "delay": lambda: shy.echo.delay(text).get(timeout=30),
        "keyword": lambda: shy.echo.apply_async((), {"text": text, "other": text}).get(timeout=30),
        "remote": lambda: shy.echo.remote(text),
        "await": lambda: asyncio.run(shy.echo.aremote(text)),
        "spawn": lambda: shy.echo.spawn(text).get(30),
        "options": lambda: shy.echo.options(priority=3).delay(text).get(timeout=30),
        "method": lambda: shy.Desk().echo.remote(text),
        "batch": lambda: shy.together.delay(text).get(timeout=30),
        "awaits": lambda: shy.awaits.delay(text).get(timeout=30),
        "retry": lambda: shy.retried.delay(text).get(timeout=30),
        "signature": lambda: shy.celery.signature(shy.echo.name, (text,)).delay().get(timeout=30),
        "chain": lambda: chain(shy.echo.s(text), shy.echo.s(other=text))().get(timeout=30),
        "group": lambda: group(shy.echo.s(text), shy.echo.s(text))().get(timeout=30),
        "chord": lambda: chord([shy.echo.s(text)], shy.echo.s(other=text))().get(timeout=30),
        "link": lambda: shy.echo.apply_async((text,), link=shy.echo.s(other=text)).get(timeout=30),
    }


@pytest.mark.parametrize("pool", POOLS)
def test_no_log_line_and_no_event_shows_arguments_or_answers(pool: str, start: Start) -> None:
    worker, shy = start(pool)
    with pooling.events("*", shy.celery, noted=dict) as seen:
        for way, send in sends(shy, SECRET).items():
            assert SECRET in str(send()), way
        last = shy.given_up.delay(SECRET)
        with pytest.raises(MaxRetriesExceededError, match="its retries are used up"):
            last.get(timeout=30)
        eventually(lambda: is_over(seen, last.id), 30)
    told = [event for event in seen if SECRET in str(event)]
    assert told == []
    received = [event for event in seen if event["type"] == "task-received"]
    assert {event["args"] for event in received} == {"<1 argument>", "()"}
    assert {event["kwargs"] for event in received} == {"{}", "<1 argument>", "<2 arguments>"}
    assert SECRET not in worker.log_text()
    assert "succeeded in" in worker.log_text()


@pytest.mark.parametrize("pool", POOLS[:2])
def test_inspect_shows_how_many_arguments_there_are(pool: str, start: Start) -> None:
    worker, shy = start(pool)
    sent = shy.echo.delay(SECRET, seconds=4.0)
    later = shy.echo.apply_async((SECRET,), countdown=60)

    def asked(what: str) -> list[Any]:
        return pooling.ask(worker, what, shy.celery) or []

    (active,) = eventually(lambda: asked("active"), 20)
    assert (active["id"], active["args"]) == (sent.id, "<1 argument>")
    (scheduled,) = eventually(lambda: asked("scheduled"), 20)
    assert scheduled["request"]["id"] == later.id
    assert SECRET not in str([active, scheduled])
    later.revoke()


@pytest.mark.parametrize("pool", POOLS)
def test_a_setting_shows_all_of_it(pool: str, start: Start) -> None:
    worker, shy = start(pool, gw_show_values=True)
    with pooling.events("*", shy.celery, noted=dict) as seen:
        sent = shy.echo.delay(SECRET, seconds=0.0 if pool == "solo" else 4.0)
        if pool != "solo":  # it answers between two bodies
            (active,) = eventually(lambda: pooling.ask(worker, "active", shy.celery), 20)
            # The parent of our pool knows the text that the caller wrote of them.
            assert active["args"] == (f"('{SECRET}',)" if pool == POOLS[0] else [SECRET])
        assert sent.get(timeout=30) == SECRET
        eventually(lambda: is_over(seen, sent.id), 30)
    (received,) = [event for event in seen if event["type"] == "task-received"]
    (succeeded,) = [event for event in seen if event["type"] == "task-succeeded"]
    assert SECRET in received["args"]
    assert SECRET in succeeded["result"]
    eventually(lambda: f"s: {SECRET!r}" in worker.log_text(), 20)


@pytest.mark.parametrize("settings", [{}, {"gw_show_values": True}])
def test_what_a_caller_writes_for_the_arguments_stays(
    settings: dict[str, Any], start: Start
) -> None:
    _, shy = start(POOLS[0], **settings)
    options = {"argsrepr": "(a text)", "kwargsrepr": "{an option}"}
    with pooling.events("*", shy.celery, noted=dict) as seen:
        sent = shy.retried.apply_async((SECRET,), {"is_last": True}, **options)
        assert sent.get(timeout=30) == SECRET
        eventually(lambda: is_over(seen, sent.id), 30)
    received = [event for event in seen if event["type"] == "task-received"]
    told = [(event["args"], event["kwargs"]) for event in received]
    assert told == [("(a text)", "{an option}")] * 2, "and its retry"


def test_a_task_can_show_its_own_answers(start: Start) -> None:
    worker, shy = start(POOLS[0])
    assert shy.shown.remote("no secret") == "no secret"
    eventually(lambda: "s: 'no secret'" in worker.log_text(), 20)
