"""Opens a queue only while a replica is READY for it, in the worker's parent.

It also fits the prefetch count to the slots: a message that a worker takes too early waits where
no other worker can get it. While results cannot be stored, it closes all queues.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

from celery import bootsteps
from celery.utils.quorum_queues import detect_quorum_queues

from gw_celery.client import beat_tasks
from gw_celery.declare import services
from gw_celery.policy import speed_bands
from gw_celery.protocol import snapshot

logger = logging.getLogger(__name__)

#: RabbitMQ's consumer argument for its priority.
_PRIORITY = "x-priority"


class _Terms(NamedTuple):
    """The prefetch count of one queue (``None``: the shared one), and the consumer's priority."""

    prefetch: int | None
    priority: int


#: The terms of a queue that Celery itself consumes.
_STOCK = _Terms(prefetch=None, priority=0)


class Gate:
    """The queues of one worker, open or closed, and its prefetch count; on the consumer's thread.

    Initially no replica is READY: all queues are closed when the consumer starts.

    Args:
        queues: Celery's ``app.amqp.queues``.
        service_queues: service key of each service queue.
        pool: the pool; the gate reads only its snapshot.
    """

    def __init__(self, queues: Any, service_queues: dict[str, str], pool: snapshot.Source) -> None:
        self._queues = queues
        self._pool = pool
        self._services = dict.fromkeys(queues.consume_from, services.PLAIN) | service_queues
        #: Queues to consume when their service is ready; control commands add and remove some.
        self._wanted = set(self._services)
        self._open: set[str] = set()
        for name in self._wanted:
            queues.deselect(name)
        #: Queues that are closed for an ordinary reason: a full service, or an outage.
        self._quiet: set[str] = set()
        #: The reason why results cannot be stored; until it is empty again, all queues are closed.
        self._outage = ""
        self._consumer: Any = None
        self._is_requested = False
        self._prefetch = 0
        self._is_per_queue = False
        #: The terms on which each queue is consumed now; ``None`` before we consume it. A missing
        #: key means `_STOCK`: Celery began to consume it.
        self._terms: dict[str, _Terms | None] = {}

    def attach(self, consumer: Any, *, is_per_queue: bool = False) -> None:
        """Set the queues and the prefetch count of a consumer that starts.

        Args:
            consumer: Celery's consumer.
            is_per_queue: whether each queue has its own prefetch count, set when its consumption
                starts, as RabbitMQ does with quorum queues.
        """
        self._consumer = consumer
        self._is_requested = False
        self._prefetch = consumer.qos.value
        self._is_per_queue = is_per_queue
        self._terms.clear()
        if is_per_queue:
            # Otherwise ``consume`` for the first queue would start all with its prefetch count.
            for name in self._open:
                consumer.task_consumer.cancel_by_queue(self._queues[name].name)
        self.apply()

    def detach(self) -> None:
        """Forget a consumer that lost its connection; the next one reads Celery's queue list."""
        self._consumer = None

    def request(self) -> None:
        """Schedule ``apply`` for the moment when Celery talks to the broker.

        This may be called during the delivery of a message; ``apply`` must wait for its end.
        """
        if self._consumer is None:
            self.apply()
        elif not self._is_requested:
            self._is_requested = True
            self._consumer.call_soon(self.apply)

    def apply(self) -> None:
        """Open and close queues according to the slots; in an outage, close all."""
        self._is_requested = False
        worker = self._pool.snapshot()
        if worker.outage and not self._outage:
            logger.warning(
                "no queue is consumed until results can be stored again: %s", worker.outage
            )
        elif self._outage and not worker.outage:
            logger.warning("queues are consumed again: results can be stored")
        self._outage = worker.outage
        for name in sorted(self._wanted):
            self._open_or_close(name, worker)
        self._fit_consumers(worker)
        self._fit_prefetch(worker)

    def add(self, name: str) -> None:
        """Manage a queue that ``add_consumer`` opened."""
        self._services.setdefault(name, services.PLAIN)
        self._wanted.add(name)
        self._open.add(name)
        # Celery 5.6 adds a deselected queue to this consumer only.
        self._queues.select_add(self._queues[name])
        self.apply()  # it closes queues without a READY replica

    def remove(self, name: str) -> None:
        """Stop managing a queue that ``cancel_consumer`` closed."""
        self._wanted.discard(name)
        self._open.discard(name)
        self._terms.pop(name, None)

    def open_queues(self) -> tuple[str, ...]:
        return tuple(sorted(self._open))

    def closed_queues(self) -> tuple[str, ...]:
        return tuple(sorted(self._wanted - self._open))

    def _open_or_close(self, name: str, worker: snapshot.Worker) -> None:
        """Open or close a queue; a full service's closes only if it shares the prefetch count."""
        service = self._services[name]
        slots = worker.ready_slots.get(service, 0)
        waiting = worker.waiting_inputs.get(service, 0)
        if name not in self._open:
            if slots and not waiting and not worker.outage:
                self._open.add(name)
                self._terms[name] = None
                self._queues.select_add(self._queues[name])
                level = logging.DEBUG if name in self._quiet else logging.INFO
                self._quiet.discard(name)
                logger.log(level, "the queue %s is consumed: a replica is ready for it", name)
            return
        is_quiet = bool(worker.outage) or (waiting > slots > 0 and self._shares_prefetch())
        if slots and not is_quiet:
            return
        self._open.discard(name)
        self._terms.pop(name, None)
        self._queues.deselect(name)
        if (task_consumer := self._task_consumer()) is not None:
            task_consumer.cancel_by_queue(self._queues[name].name)
        if is_quiet:
            self._quiet.add(name)
            logger.debug("the queue %s is not consumed: its inputs wait here, or all do", name)
        else:
            logger.info("the queue %s is not consumed: no replica is ready for it", name)

    def _task_consumer(self) -> Any:
        return None if self._consumer is None else self._consumer.task_consumer

    def _followed(self) -> set[str]:
        """Return the services whose slots make up the prefetch count.

        Beat's tasks do not count: they need a slot for milliseconds only. If they did, a full
        worker would take an input that another worker could run.
        """
        return {self._services[name] for name in self._wanted if name != beat_tasks.QUEUE}

    def _shares_prefetch(self) -> bool:
        return not self._is_per_queue and len(self._followed()) > 1

    def _fit_consumers(self, worker: snapshot.Worker) -> None:
        """Consume the open queues that are not consumed yet, or are consumed on other terms."""
        if (task_consumer := self._task_consumer()) is None:
            return
        for name in sorted(self._open):
            terms = self._terms_of(name, worker)
            if self._terms.get(name, _STOCK) == terms:
                continue
            task_consumer.cancel_by_queue(self._queues[name].name)
            if terms.prefetch is not None:
                task_consumer.qos(prefetch_count=terms.prefetch, apply_global=False)
            queue = self._queues[name]
            if terms.priority:  # otherwise keep the user's declaration
                queue = copy.copy(queue)
                arguments = {**(queue.consumer_arguments or {}), _PRIORITY: terms.priority}
                queue.consumer_arguments = arguments
            task_consumer.add_queue(queue)
            task_consumer.consume()
            self._terms[name] = terms

    def _terms_of(self, name: str, worker: snapshot.Worker) -> _Terms:
        service, consumer, prefetch = self._services[name], self._consumer, None
        if self._is_per_queue:
            unit = consumer.prefetch_multiplier if consumer.initial_prefetch_count else 0
            prefetch = max(1, worker.ready_slots.get(service, 0)) * unit
        is_users = _PRIORITY in (self._queues[name].consumer_arguments or {})
        band = None if is_users else worker.bands.get(service)
        return _Terms(prefetch, speed_bands.Band[band.upper()] if band else 0)

    def _fit_prefetch(self, worker: snapshot.Worker) -> None:
        """Set the prefetch count to the number of slots and of inputs that wait here.

        Otherwise waiting inputs would use up the count, and other services could not fill slots.
        """
        consumer = self._consumer
        if consumer is None or not consumer.qos or not consumer.initial_prefetch_count:
            return  # the project chose 0, no limit
        followed = self._followed()
        messages = sum(worker.ready_slots.get(service, 0) for service in followed)
        if self._shares_prefetch():
            messages += sum(worker.waiting_inputs.get(service, 0) for service in followed)
        wanted = max(1, messages) * consumer.prefetch_multiplier
        if wanted > self._prefetch:
            consumer.qos.increment_eventually(wanted - self._prefetch)
        elif wanted < self._prefetch:
            consumer.qos.decrement_eventually(self._prefetch - wanted)
        self._prefetch = wanted
        if consumer.qos.value != consumer.qos.prev:
            # Celery would do it after its loop has waited for the next event, up to a second.
            consumer.qos.update()


class GateStep(bootsteps.StartStopStep):
    """The bootstep that attaches the gate to each consumer that starts."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        driver = consumer.connection.transport.driver_type
        is_quorum, _ = detect_quorum_queues(consumer.app, driver)
        # RabbitMQ may deliver while the gate consumes; Celery sets this only when its loop starts.
        consumer.task_consumer.on_message = consumer.create_task_handler()
        consumer.pool.gate.attach(consumer, is_per_queue=is_quorum)

    def stop(self, consumer: Any) -> None:
        consumer.pool.gate.detach()
