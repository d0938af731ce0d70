"""A request on the threads pool: two threads may answer it, and one of them revokes it."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, states
from celery.concurrency.thread import TaskPool
from celery.exceptions import Ignore, TaskRevokedError
from kombu import Message, serialization

from gw_celery.runtime import body as runtime_body
from gw_celery.worker.request import Request


def message_of(app: Celery, task: str) -> Message:
    """A message as a broker delivers it."""
    sent = app.amqp.as_task_v2("42", task, (), {})
    content_type, content_encoding, body = serialization.dumps(sent.body, "json")
    return Message(
        body=body,
        headers=sent.headers,
        properties=sent.properties,
        content_type=content_type,
        content_encoding=content_encoding,
        accept={content_type},
    )


@pytest.mark.parametrize("second", ["acknowledge", "reject"])
@pytest.mark.parametrize("first", ["acknowledge", "reject"])
def test_two_threads_that_answer_a_message_at_once_answer_it_once(
    celery_app: Celery, first: str, second: str
) -> None:
    @celery_app.task(name="proj.embed")
    def embed() -> None: ...

    others: list[threading.Thread] = []
    answers: list[str] = []

    def answered(how: str) -> None:
        answers.append(how)
        if not others:
            others.append(threading.Thread(target=getattr(request, second)))
            others[0].start()
            others[0].join(0.1)

    request: Any = Request(
        message_of(celery_app, "proj.embed"),
        app=celery_app,
        task=embed,
        on_ack=lambda *_: answered("acknowledge"),
        on_reject=lambda *_: answered("reject"),
    )
    getattr(request, first)()
    others[0].join(10.0)
    assert answers == [first]


def test_a_message_is_answered_by_the_handler_of_a_signal_that_interrupts_an_answer(
    celery_app: Celery,
) -> None:
    # As in a cold shutdown: Celery stops the pool in its handler, wherever its loop was.
    @celery_app.task(name="proj.embed")
    def embed() -> None: ...

    answers: list[str] = []

    def request_of(name: str, meanwhile: Callable[[], None]) -> Any:
        def answer(*_: Any) -> None:
            meanwhile()
            answers.append(name)

        message = message_of(celery_app, "proj.embed")
        return Request(message, app=celery_app, task=embed, on_ack=answer)

    other = request_of("other", lambda: None)
    interrupted = request_of("interrupted", other.acknowledge)
    loop = threading.Thread(target=interrupted.acknowledge, daemon=True)
    loop.start()
    loop.join(10.0)
    assert answers == ["other", "interrupted"]


@pytest.mark.parametrize("is_async", [True, False])
def test_what_is_revoked_just_before_its_state_is_started_stays_revoked(
    celery_app: Celery, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    @celery_app.task(name="proj.embed", track_started=True)
    def embed() -> None: ...

    embed.gw_method = types.SimpleNamespace(is_async=is_async)
    monkeypatch.setattr(runtime_body, "running", Loading())
    request: Any = Request(message_of(celery_app, "proj.embed"), app=celery_app, task=embed)
    request.on_accepted(0, time.monotonic())
    request.terminate(TaskPool(1), "TERM")
    embed.backend.store_result("42", None, states.STARTED)  # its tracer, in the other thread
    try:
        raise Ignore  # what its task makes of the revocation of its body
    except Ignore:
        request.on_failure(ExceptionInfo())

    assert embed.AsyncResult("42").state == states.REVOKED


def test_a_request_that_is_terminated_as_it_is_accepted_is_announced_once(
    celery_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Eventer:
        enabled = True

        def send(self, kind: str, **fields: Any) -> None:
            told.append(kind)
            if kind == "task-started":  # the control command comes just then
                request.terminate(TaskPool(1), "TERM")

    @celery_app.task(name="proj.embed")
    def embed() -> None: ...

    embed.gw_method = types.SimpleNamespace(is_async=True)
    monkeypatch.setattr(runtime_body, "running", Loading())
    told: list[str] = []
    message = message_of(celery_app, "proj.embed")
    request: Any = Request(message, app=celery_app, task=embed, eventer=Eventer())
    with pytest.raises(TaskRevokedError):
        request.on_accepted(0, time.monotonic())
    assert told == ["task-started", "task-revoked"]


class Loading:
    """Stands for what runs, with one input in it."""

    def revoke(self, task_id: str) -> None: ...

    def interrupt(self, task_id: str, exc: BaseException | None) -> bool:
        return True
