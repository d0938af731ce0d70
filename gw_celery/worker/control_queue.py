"""The queue of the sweeps in a worker with the GPU pool: never gated, and with a credit of its own.

It is consumed on a channel beside that of the inputs. With theirs it would share their prefetch
count: a busy worker would take one input more than it has slots for, and then no sweep.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import bootsteps
from kombu.common import ignore_errors

from gw_celery.client import beat_tasks

logger = logging.getLogger(__name__)


class ControlQueue:
    """Whether the queue of the sweeps is consumed; on the consumer's thread."""

    def __init__(self) -> None:
        self._is_wanted = True
        self._celery_consumer: Any = None
        self._consumer: Any = None
        self.is_consumed = False

    def attach(self, celery_consumer: Any) -> None:
        """Celery's consumer has started."""
        self._celery_consumer = celery_consumer
        self._open()

    def detach(self) -> None:
        """It stops, or has lost its connection; the next one consumes what is wanted."""
        self._cancel()
        if (made := self._consumer) is not None:
            ignore_errors(self._celery_consumer, made.channel.close)
        self._consumer = self._celery_consumer = None

    def add(self) -> None:
        """The command ``add_consumer`` names the queue."""
        self._is_wanted = True
        self._open()

    def remove(self) -> None:
        """A queue that ``cancel_consumer`` closed stays closed."""
        self._is_wanted = False
        self._cancel()

    def _open(self) -> None:
        if self._celery_consumer is None or self.is_consumed or not self._is_wanted:
            return
        if self._consumer is None:
            self._consumer = self._made()
        if self._consumer is not None:
            self._consumer.consume()
            self.is_consumed = True

    def _made(self) -> Any:
        """Return a consumer with a channel of its own, if there is such a queue."""
        celery_consumer = self._celery_consumer
        amqp = celery_consumer.app.amqp
        try:
            queue = beat_tasks.queue_of(celery_consumer.app)
        except KeyError:  # the project makes no queues that it has not named
            logger.warning("task_queues lacks %s: this worker hears no beat", beat_tasks.QUEUE)
            return None
        made = amqp.TaskConsumer(
            celery_consumer.connection.channel(),
            queues=[queue],
            on_message=celery_consumer.create_task_handler(),
            on_decode_error=celery_consumer.on_decode_error,
        )
        made.qos(prefetch_count=1)
        return made

    def _cancel(self) -> None:
        """Stop consuming. The channel stays: kombu 5.6 reads no other once one has closed."""
        if self.is_consumed:
            self.is_consumed = False
            ignore_errors(self._celery_consumer, self._consumer.cancel)


class ControlStep(bootsteps.StartStopStep):
    """Attaches the worker's queue of sweeps to each consumer that starts."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        if (control := consumer.pool.control) is not None:
            control.attach(consumer)

    def stop(self, consumer: Any) -> None:
        if (control := consumer.pool.control) is not None:
            control.detach()

    def info(self, consumer: Any) -> dict[str, Any]:
        """Part of ``inspect stats``: ``active_queues`` knows the queues of inputs only."""
        control = consumer.pool.control
        is_consumed = control is not None and control.is_consumed
        return {"gw_control": {"queue": beat_tasks.QUEUE, "is_consumed": is_consumed}}
