"""Solo and the GPU pool answer every message in the worker's main thread, its signals included."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from celery import Celery
from kombu import Message, serialization
from kombu.utils.imports import symbol_by_name

import gw_celery as gw

SECONDS = 10


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


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Have SIGUSR1 call a function, as Celery's handler of SIGQUIT stops the pool."""
    before = signal.getsignal(signal.SIGUSR1)

    def install(call: Callable[[], None]) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            call()

        signal.signal(signal.SIGUSR1, handle)

    # A lock that an answer holds would hang this thread for good: end it with an error.
    signal.signal(signal.SIGALRM, _raise)
    signal.alarm(SECONDS)
    yield install
    signal.alarm(0)
    signal.signal(signal.SIGUSR1, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("an answer waits for the one that it interrupts")


@pytest.mark.parametrize("second", ["acknowledge", "reject"])
@pytest.mark.parametrize("first", ["acknowledge", "reject"])
def test_the_handler_of_a_signal_that_interrupts_an_answer_answers_others(
    app: gw.App, on_signal: Callable[[Callable[[], None]], None], first: str, second: str
) -> None:
    @app.remote
    async def embed() -> None: ...

    answers: list[str] = []

    def request_of(name: str, meanwhile: Callable[[], None]) -> Any:
        def answer(*_: Any) -> None:
            meanwhile()
            answers.append(name)

        message = message_of(app.celery, embed.name)
        made = symbol_by_name(embed.Request)
        return made(message, app=app.celery, task=embed, on_ack=answer, on_reject=answer)

    other = request_of("other", lambda: None)
    on_signal(getattr(other, second))
    interrupted = request_of("interrupted", lambda: signal.raise_signal(signal.SIGUSR1))
    getattr(interrupted, first)()
    assert answers == ["other", "interrupted"]
