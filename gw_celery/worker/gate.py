"""Consume a queue only while a replica is READY for it, and never more than the slots can take.

A message that is taken while a model loads, or by a worker whose model cannot load, waits where no
other worker can have it. One that is taken while results cannot be stored is work for nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.utils.quorum_queues import detect_quorum_queues

from gw_celery.client import beat_tasks
from gw_celery.declare import services
from gw_celery.protocol import snapshot

logger = logging.getLogger(__name__)

#: RabbitMQ's argument of a consumer.
_PRIORITY = "x-priority"


class Gate:
    """The queues of one worker, open or closed, and its prefetch count; on the consumer's thread.

    Args:
        queues: Celery's ``app.amqp.queues``.
        service_queues: the service of each service queue.
        pool: the pool, of which only the snapshot is read.
        priority: the priority of this worker for a service, beside others; ``None`` where the
            broker prefers no consumer.
    """

    def __init__(
        self,
        queues: Any,
        service_queues: dict[str, str],
        pool: snapshot.Source,
        priority: Callable[[str], int] | None = None,
    ) -> None:
        self._queues = queues
        self._priority = priority
        self._pool = pool
        self._services = dict.fromkeys(queues.consume_from, services.PLAIN) | service_queues
        #: What is consumed when its service is ready; commands add and take away.
        self._wanted = set(self._services)
        self._open = set(self._wanted)
        #: Closed for a reason that is no news: their service is full, or consuming is paused.
        self._quiet: set[str] = set()
        #: Results cannot be stored, so that nothing is consumed.
        self._is_paused = False
        self._consumer: Any = None
        self._is_requested = False
        self._prefetch = 0
        self._is_per_queue = False
        #: The prefetch counts with which queues are consumed, where each has its own.
        self._credit: dict[str, int] = {}
        #: The priority with which each queue is consumed.
        self._priorities: dict[str, int] = {}

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
        self._credit.clear()
        self._priorities.clear()
        if is_per_queue:
            # Else the first that is consumed with its count would take all others along.
            for name in self._open:
                consumer.task_consumer.cancel_by_queue(self._queues[name].name)
        self.apply()

    def detach(self) -> None:
        """The connection is lost; the selection stays, and the next consumer reads it."""
        self._consumer = None

    def close_all(self) -> None:
        """Nothing is READY yet: the consumer starts without queues."""
        for name in list(self._open):
            self._queues.deselect(name)
        self._open.clear()

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
        """Open and close queues as the slots are now.

        A full service closes its queue only where others share the prefetch count with it. While
        results cannot be stored all are closed.
        """
        self._is_requested = False
        worker = self._pool.snapshot()
        self._pause_or_resume(worker.outage)
        if self._is_paused:
            for name in sorted(self._open & self._wanted):
                self._set_closed(name, is_quiet=True)
        else:
            self._follow(worker)
        self._fit_priorities()
        if self._is_per_queue:
            self._fit_each(worker.ready_slots)
        self._fit_prefetch(worker)

    def _pause_or_resume(self, outage: str) -> None:
        if outage and not self._is_paused:
            logger.warning("no queue is consumed until results can be stored again: %s", outage)
        elif self._is_paused and not outage:
            logger.warning("queues are consumed again: results can be stored")
        self._is_paused = bool(outage)

    def _follow(self, worker: snapshot.Worker) -> None:
        for name in sorted(self._wanted):
            service = self._services[name]
            slots = worker.ready_slots.get(service, 0)
            waiting = worker.waiting_inputs.get(service, 0)
            if name not in self._open and slots and not waiting:
                self._set_open(name)
            elif name in self._open and not slots:
                self._set_closed(name, is_quiet=False)
            elif name in self._open and waiting > slots and self._shares_prefetch():
                self._set_closed(name, is_quiet=True)

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
        self._forget(name)

    def open_queues(self) -> tuple[str, ...]:
        return tuple(sorted(self._open))

    def closed_queues(self) -> tuple[str, ...]:
        return tuple(sorted(self._wanted - self._open))

    def _followed(self) -> set[str]:
        """The services whose slots are the prefetch count.

        Beat's tasks take the place of an input for some milliseconds. With a count of their own a
        worker that has no slot left would take inputs that another one could run.
        """
        return {self._services[name] for name in self._wanted if name != beat_tasks.QUEUE}

    def _shares_prefetch(self) -> bool:
        return not self._is_per_queue and len(self._followed()) > 1

    def _set_open(self, name: str) -> None:
        self._open.add(name)
        self._queues.select_add(self._queues[name])
        if not self._is_per_queue:
            self._consume(name)
        level = logging.DEBUG if name in self._quiet else logging.INFO
        self._quiet.discard(name)
        logger.log(level, "the queue %s is consumed: a replica is ready for it", name)

    def _consume(self, name: str) -> None:
        if (task_consumer := self._task_consumer()) is not None:
            priority = self._priorities[name] = self._priority_of(name)
            task_consumer.add_queue(_preferred(self._queues[name], priority))
            task_consumer.consume()

    def _priority_of(self, name: str) -> int:
        """Of a consumer of this queue; 0, which all others have, where the user has decided it."""
        is_given = _PRIORITY in (self._queues[name].consumer_arguments or {})
        return 0 if self._priority is None or is_given else self._priority(self._services[name])

    def _fit_priorities(self) -> None:
        """Consume those open queues anew whose priority has changed."""
        if (task_consumer := self._task_consumer()) is None:
            return
        for name in sorted(self._open):
            if self._priorities.get(name, 0) == self._priority_of(name):
                continue
            if self._is_per_queue:
                self._credit.pop(name, None)  # it is consumed anew with its count
            else:
                task_consumer.cancel_by_queue(self._queues[name].name)
                self._consume(name)

    def _fit_each(self, ready: dict[str, int]) -> None:
        """Consume each open queue with the slots of its service, anew when they have changed."""
        consumer, task_consumer = self._consumer, self._task_consumer()
        if task_consumer is None:
            return
        unit = consumer.prefetch_multiplier if consumer.initial_prefetch_count else 0
        for name in sorted(self._open):
            wanted = max(1, ready.get(self._services[name], 0)) * unit
            if self._credit.get(name) != wanted:
                self._credit[name] = wanted
                task_consumer.cancel_by_queue(self._queues[name].name)
                task_consumer.qos(prefetch_count=wanted, apply_global=False)
                self._consume(name)

    def _set_closed(self, name: str, *, is_quiet: bool) -> None:
        self._forget(name)
        if is_quiet:
            self._quiet.add(name)
        self._open.discard(name)
        self._queues.deselect(name)
        if (task_consumer := self._task_consumer()) is not None:
            task_consumer.cancel_by_queue(self._queues[name].name)
        if is_quiet:
            logger.debug("the queue %s is not consumed: its inputs wait here, or all do", name)
        else:
            logger.info("the queue %s is not consumed: no replica is ready for it", name)

    def _forget(self, name: str) -> None:
        self._credit.pop(name, None)
        self._priorities.pop(name, None)

    def _task_consumer(self) -> Any:
        return None if self._consumer is None else self._consumer.task_consumer

    def _fit_prefetch(self, worker: snapshot.Worker) -> None:
        """Ask for as many messages as there are slots, and those that wait for one besides.

        The latter hold the credit of other services, whose slots may be free.
        """
        consumer = self._consumer
        if consumer is None or not consumer.qos or not consumer.initial_prefetch_count:
            return  # 0 is a project's choice: no limit
        followed = self._followed()
        slots = sum(worker.ready_slots.get(service, 0) for service in followed)
        waiting = 0
        if self._shares_prefetch():
            waiting = sum(worker.waiting_inputs.get(service, 0) for service in followed)
        wanted = max(1, slots + waiting) * consumer.prefetch_multiplier
        if wanted > self._prefetch:
            consumer.qos.increment_eventually(wanted - self._prefetch)
        elif wanted < self._prefetch:
            consumer.qos.decrement_eventually(self._prefetch - wanted)
        self._prefetch = wanted
        if consumer.qos.value != consumer.qos.prev:
            # Celery does it once its loop has waited for whatever comes next, for up to a second.
            consumer.qos.update()


def _preferred(queue: Any, priority: int) -> Any:
    """The queue, to be consumed with a priority; Celery's own stays as the user declared it."""
    if not priority:
        return queue
    preferred = copy.copy(queue)
    preferred.consumer_arguments = {**(queue.consumer_arguments or {}), _PRIORITY: priority}
    return preferred


class GateStep(bootsteps.StartStopStep):
    """Attaches the worker's gate to each consumer that starts."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        gate = consumer.pool.gate
        if gate is not None:
            driver = consumer.connection.transport.driver_type
            is_quorum, _ = detect_quorum_queues(consumer.app, driver)
            gate.attach(consumer, is_per_queue=is_quorum)

    def stop(self, consumer: Any) -> None:
        gate = consumer.pool.gate
        if gate is not None:
            gate.detach()
