from __future__ import annotations

import types
from typing import Any

import pytest
from celery import Celery

from gw_celery.worker import control_queue


class Consumer:
    """Celery's consumer, on a broker in memory."""

    connection_errors = channel_errors = ()

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.connection = app.connection_for_read()
        self.pool = types.SimpleNamespace(control=None)
        self.taken: list[Any] = []

    def create_task_handler(self) -> Any:
        return self.take

    def take(self, message: Any) -> None:
        self.taken.append(message)

    def on_decode_error(self, message: Any, exc: Exception) -> None: ...

    def drain(self) -> list[str]:
        """Take what the broker gives now; returns the tasks of all that was taken."""
        try:
            while True:
                self.connection.drain_events(timeout=0.05)
        except TimeoutError:
            return [one.headers["task"] for one in self.taken]

    def lose_connection(self) -> None:
        self.connection.close()
        self.connection = self.app.connection_for_read()


@pytest.fixture
def consumer(celery_app: Celery) -> Consumer:
    return Consumer(celery_app)


@pytest.fixture
def control(consumer: Consumer) -> control_queue.ControlQueue:
    made = control_queue.ControlQueue()
    made.attach(consumer)
    return made


def send(app: Celery, name: str) -> None:
    app.send_task(name, queue="gw.control")


def test_one_message_at_a_time_is_taken(
    consumer: Consumer, control: control_queue.ControlQueue, celery_app: Celery
) -> None:
    assert control.is_consumed
    send(celery_app, "first")
    send(celery_app, "second")
    assert consumer.drain() == ["first"]
    consumer.taken[0].ack()
    assert consumer.drain() == ["first", "second"]


def test_a_queue_that_was_cancelled_stays_so_over_connections_until_it_is_added(
    consumer: Consumer, control: control_queue.ControlQueue, celery_app: Celery
) -> None:
    control.remove()
    send(celery_app, "first")
    control.detach()
    consumer.lose_connection()
    control.attach(consumer)
    assert (control.is_consumed, consumer.drain()) == (False, [])
    control.add()
    assert (control.is_consumed, consumer.drain()) == (True, ["first"])
    control.add()
    assert len(control._consumer.queues) == 1


def test_a_new_connection_consumes_it_again(
    consumer: Consumer, control: control_queue.ControlQueue, celery_app: Celery
) -> None:
    control.detach()
    assert not control.is_consumed
    consumer.lose_connection()
    control.attach(consumer)
    send(celery_app, "first")
    assert consumer.drain() == ["first"]


def test_what_commands_say_without_a_connection_counts_for_the_next(
    consumer: Consumer, control: control_queue.ControlQueue
) -> None:
    control.detach()
    control.remove()
    control.add()
    assert not control.is_consumed
    control.attach(consumer)
    assert control.is_consumed


def test_a_project_that_makes_no_queues_by_itself_is_warned_and_served(
    consumer: Consumer, celery_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    celery_app.conf.task_create_missing_queues = False
    control = control_queue.ControlQueue()
    control.attach(consumer)
    assert not control.is_consumed
    assert "task_queues lacks gw.control: this worker hears no beat" in caplog.text


def test_the_step_follows_the_consumer_and_tells_stats(consumer: Consumer) -> None:
    step = control_queue.ControlStep(consumer)
    step.start(consumer)
    step.stop(consumer)
    assert step.info(consumer) == {"gw_control": {"queue": "gw.control", "is_consumed": False}}
    consumer.pool.control = control_queue.ControlQueue()
    step.start(consumer)
    assert step.info(consumer)["gw_control"]["is_consumed"]
    step.stop(consumer)
    assert not step.info(consumer)["gw_control"]["is_consumed"]
