"""Consume a queue only while a replica is READY for it, and never more than the slots can take.

A message that is taken while a model loads, or by a worker whose model cannot load, waits where no
other worker can have it. One that is taken while results cannot be stored is work for nothing.
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

#: RabbitMQ's argument of a consumer.
_PRIORITY = "x-priority"


class _Terms(NamedTuple):
    """How a queue is consumed: with a prefetch count of its own, and beside other workers."""

    prefetch: int | None
    priority: int


#: The terms of a queue that Celery consumes by itself.
_STOCK = _Terms(prefetch=None, priority=0)


class Gate:
    """The queues of one worker, open or closed, and its prefetch count; on the consumer's thread.

    At first nothing is READY, and all are closed: the consumer starts without queues.

    Args:
        queues: Celery's ``app.amqp.queues``.
        service_queues: the service of each service queue.
        pool: the pool, of which only the snapshot is read.
    """

    def __init__(self, queues: Any, service_queues: dict[str, str], pool: snapshot.Source) -> None:
        self._queues = queues
        self._pool = pool
        self._services = dict.fromkeys(queues.consume_from, services.PLAIN) | service_queues
        #: What is consumed when its service is ready; commands add and take away.
        self._wanted = set(self._services)
        self._open: set[str] = set()
        for name in self._wanted:
            queues.deselect(name)
        #: Closed as a matter of course: their service is full, or no result can be stored.
        self._quiet: set[str] = set()
        #: Why results cannot be stored, so that nothing is consumed.
        self._outage = ""
        self._consumer: Any = None
        self._is_requested = False
        self._prefetch = 0
        self._is_per_queue = False
        #: How each queue is consumed now; `_STOCK` where Celery began it, ``None`` where nothing
        #: did yet.
        self._terms: dict[str, _Terms | None] = {}

    def attach(self, consumer: Any, *, is_per_queue: bool = False) -> None:
        """A consumer starts: its queues and prefetch count are made to fit.

        Args:
            is_per_queue: whether the broker counts for each queue, and from the time when it is
                consumed: RabbitMQ does so with quorum queues.
        """
        self._consumer = consumer
        self._is_requested = False
        self._prefetch = consumer.qos.value
        self._is_per_queue = is_per_queue
        self._terms.clear()
        if is_per_queue:
            # Else the first that is consumed with its count would take all others along.
            for name in self._open:
                consumer.task_consumer.cancel_by_queue(self._queues[name].name)
        self.apply()

    def detach(self) -> None:
        """The connection is lost; the selection stays, and the next consumer reads it."""
        self._consumer = None

    def request(self) -> None:
        """Have ``apply`` called soon, where Celery talks to the broker.

        Not at once: it may be called in the middle of a message's delivery.
        """
        if self._consumer is None:
            self.apply()
        elif not self._is_requested:
            self._is_requested = True
            self._consumer.call_soon(self.apply)

    def apply(self) -> None:
        """Open and close queues as the slots are now; all are closed in an outage."""
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
        """A queue that ``add_consumer`` opened is the gate's from now on."""
        self._services.setdefault(name, services.PLAIN)
        self._wanted.add(name)
        self._open.add(name)
        # Celery 5.6 adds a queue that was deselected to this consumer only.
        self._queues.select_add(self._queues[name])
        self.apply()  # it closes what no replica is ready for

    def remove(self, name: str) -> None:
        """A queue that ``cancel_consumer`` closed stays closed."""
        self._wanted.discard(name)
        self._open.discard(name)
        self._terms.pop(name, None)

    def open_queues(self) -> tuple[str, ...]:
        return tuple(sorted(self._open))

    def closed_queues(self) -> tuple[str, ...]:
        return tuple(sorted(self._wanted - self._open))

    def _open_or_close(self, name: str, worker: snapshot.Worker) -> None:
        """A full service closes its queue only where others share the prefetch count with it."""
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
        """The services whose slots are the prefetch count.

        Beat's tasks take the place of an input for some milliseconds. With a count of their own a
        worker that has no slot left would take inputs that another worker could run.
        """
        return {self._services[name] for name in self._wanted if name != beat_tasks.QUEUE}

    def _shares_prefetch(self) -> bool:
        return not self._is_per_queue and len(self._followed()) > 1

    def _fit_consumers(self, worker: snapshot.Worker) -> None:
        """Consume the open queues that are not consumed yet, or on other terms."""
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
            if terms.priority:  # Celery's own stays as the user declared it
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
        """Ask for as many messages as there are slots, and those that wait for one besides.

        The latter hold the credit of other services, whose slots may be free.
        """
        consumer = self._consumer
        if consumer is None or not consumer.qos or not consumer.initial_prefetch_count:
            return  # 0 is a project's choice: no limit
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
            # Celery does it once its loop has waited for whatever comes next, for up to a second.
            consumer.qos.update()


class GateStep(bootsteps.StartStopStep):
    """Attaches the worker's gate to each consumer that starts."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        driver = consumer.connection.transport.driver_type
        is_quorum, _ = detect_quorum_queues(consumer.app, driver)
        consumer.pool.gate.attach(consumer, is_per_queue=is_quorum)

    def stop(self, consumer: Any) -> None:
        consumer.pool.gate.detach()
