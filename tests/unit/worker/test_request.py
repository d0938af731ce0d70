"""A request that two threads answer at once, as on the threads pool."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from celery import Celery
from kombu import Message, serialization

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
