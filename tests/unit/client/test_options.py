"""Which options of a call are known, against Celery's and kombu's own signatures."""

from __future__ import annotations

import inspect
from typing import Any

import amqp.basic_message
import kombu
import pytest
from celery import Celery, Task
from celery.app.amqp import AMQP
from celery.app.task import extract_exec_options

import gw_celery as gw

#: What a caller gives in other ways, or not at all.
NOT_OPTIONS = {
    "self", "args", "kwargs", "options", "properties", "body", "name", "callbacks", "errbacks",
    "now", "timezone", "application_headers",
}  # fmt: skip


def test_every_option_of_celery_and_of_its_publisher_is_taken(app: gw.App) -> None:
    @app.remote
    async def square(x): ...

    takes = (Task.apply_async, Celery.send_task, AMQP.as_task_v2, kombu.Producer.publish)
    taken = {name for one in takes for name in inspect.signature(one).parameters}
    taken |= {name for name, _ in amqp.basic_message.Message.PROPERTIES}

    class AllOptions:
        def __getattr__(self, name: str) -> str:
            return name

    taken |= {*extract_exec_options(AllOptions())}
    for name in taken - NOT_OPTIONS:
        assert square.options(**{name: None}).task.name == square.name


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("timeot", "timeout"), ("time_out", "timeout"), ("priorty", "priority"), ("queu", "queue")],
)
def test_an_option_that_is_nearly_a_known_one_is_refused_with_it(
    app: gw.App, wrong: str, right: str
) -> None:
    @app.remote
    async def square(x): ...

    @app.cls
    class Model:
        @gw.method()
        async def ask(self): ...

    for task in (square, Model().ask, square.options(countdown=1)):
        with pytest.raises(gw.UsageError, match=rf"{wrong}=5\): .* did you mean {right}=\?"):
            task.options(**{wrong: 5})


@pytest.mark.parametrize(
    "given",
    [
        {"message_group_id": "a"},
        {"MessageGroupId": "a", "DelaySeconds": 3, "MessageId": "b"},
        {"confirm_timeout": 3, "expiration": 5, "app_id": "a"},
        {"stamped_headers": ["prio"], "prio": 3, "headers": {"timeot": 1}},
        {"stamped_headers": ["timeot"], "timeot": 3},
    ],
)
def test_what_is_meant_for_the_broker_or_is_celerys_is_sent(
    app: gw.App, given: dict[str, Any]
) -> None:
    @app.remote
    async def square(x): ...

    assert square.options(**given).s(5).options.items() >= given.items()
