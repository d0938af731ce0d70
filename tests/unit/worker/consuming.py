"""The consumer of a worker with the GPU pool, over a broker in memory.

The consumer's class, its steps and its gate are those that a worker gets at its start; what the
pool says of its slots is the test's::

    worker.sees(embed=2)            # slots that are READY, by the names of the services
    assert worker.consumed == {EMBED}

- ``worker.sees(...)``: slots, ``waiting=``, ``bands=`` and ``outage=`` are others now.
- ``worker.connect()`` and ``worker.disconnect()``: the broker comes and goes.
- ``worker.add(queue)`` and ``worker.cancel(queue)`` do what Celery's control commands do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from celery.worker import state
from celery.worker.consumer import Tasks
from kombu.asynchronous.timer import Timer
from kombu.utils.imports import symbol_by_name

from tests.pool_harness import Harness

EMBED, CLASSIFY, PLAIN = "cpu.embed", "cpu.classify", "celery"
_QUEUES = (EMBED, CLASSIFY, PLAIN)


class Channel:
    """A channel's consumer that notes how each queue is consumed, and what the broker is told."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self._prefetch = 1
        #: By queue: the count that was told last before it was consumed.
        self.counts: dict[str, int] = {}
        #: By queue: the arguments that it is consumed with.
        self.arguments: dict[str, Any] = {}
        #: The queues in the order in which their consumption began.
        self.began: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    @property
    def on_message(self) -> Any:
        return self._made.on_message

    @on_message.setter
    def on_message(self, handle: Any) -> None:
        self._made.on_message = handle

    def qos(self, prefetch_count: int, apply_global: bool) -> None:
        self._prefetch = prefetch_count
        self._made.qos(prefetch_count=prefetch_count, apply_global=apply_global)

    def consume(self) -> None:
        for queue in self._made.queues:
            if not self._made.consuming_from(queue):
                self.counts[queue.name] = self._prefetch
                self.arguments[queue.name] = queue.consumer_arguments
                self.began.append(queue.name)
        self._made.consume()

    def cancel_by_queue(self, name: str) -> None:
        self.counts.pop(name, None)
        self._made.cancel_by_queue(name)


class Consuming:
    """A worker of the queues ``EMBED``, ``CLASSIFY`` and ``PLAIN``; see the head of this module."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.app = harness.app
        self.pool = harness.pool
        self.queues = self.app.amqp.queues
        self.hub: Any = None
        self.consumer: Any = None
        self._step: Any = None
        self._measured = self.pool.snapshot
        self._ready: dict[str, int] = {}
        self._waiting: Mapping[str, int] = {}
        self._bands: Mapping[str, str] = {}
        self._outage = ""
        self.pool.snapshot = self._snapshot

    # -- the broker --

    def make(self, *, prefetch: int = 1, multiplier: int = 1) -> Any:
        """Return a consumer that has no connection."""
        return symbol_by_name(self.harness.worker.consumer_cls)(
            lambda request: None,
            app=self.app,
            pool=self.pool,
            hub=self.hub,
            timer=Timer(),
            controller=SimpleNamespace(use_eventloop=True, state=state),
            initial_prefetch_count=prefetch * multiplier,
            prefetch_multiplier=multiplier,
        )

    def connect(self, *, is_quorum: bool = False, **options: int) -> None:
        """Connect as Celery does, with the steps that talk to the broker of queues."""
        self.consumer = self.make(**options)
        self.consumer.connection = self.app.connection_for_read()
        if is_quorum:
            self.consumer.connection.transport.driver_type = "amqp"
            for name in _QUEUES:
                self.queues[name].queue_arguments = {"x-queue-type": "quorum"}
        Tasks(self.consumer).start(self.consumer)
        self.channel = self.consumer.task_consumer = Channel(self.consumer.task_consumer)
        steps = [step for step in self.app.steps["consumer"] if isinstance(step, type)]
        (step,) = [step for step in steps if step.__module__.startswith("gw_celery")]
        self._step = step(self.consumer)
        self._step.start(self.consumer)
        self.channel.consume()

    def disconnect(self) -> None:
        """Lose the connection."""
        self._step.stop(self.consumer)

    # -- the pool --

    def sees(
        self,
        *,
        waiting: Mapping[str, int] | None = None,
        bands: Mapping[str, str] | None = None,
        outage: str | None = None,
        **ready: int,
    ) -> None:
        """Have the pool see other slots, by the names of services; what is not named stays.

        Args:
            waiting: inputs that wait for a slot.
            bands: how quick this worker is among others.
            outage: why no result can be stored.
        """
        self._ready |= ready
        self._waiting = self._waiting if waiting is None else waiting
        self._bands = self._bands if bands is None else bands
        self._outage = self._outage if outage is None else outage
        self.pool.slots_changed()
        self.turn()

    def turn(self) -> None:
        """Celery's loop comes to what was queued for it."""
        if self.consumer is not None:
            self.consumer.perform_pending_operations()

    # -- control commands --

    def add(self, queue: str) -> None:
        self.consumer.add_task_queue(queue)

    def cancel(self, queue: str) -> None:
        self.consumer.cancel_task_queue(queue)

    # -- what is seen --

    @property
    def consumed(self) -> set[str]:
        """What this connection consumes."""
        return {name for name in (*_QUEUES, "added") if self.channel.consuming_from(name)}

    @property
    def selected(self) -> list[str]:
        """What the next connection would consume."""
        return sorted(self.queues.consume_from)

    @property
    def opened(self) -> tuple[str, ...]:
        """What ``gw_status`` shows as open."""
        return tuple(self.pool.snapshot().open_queues)

    @property
    def closed(self) -> tuple[str, ...]:
        """What ``gw_status`` shows as closed."""
        return tuple(self.pool.snapshot().closed_queues)

    @property
    def prefetch(self) -> int:
        return int(self.consumer.qos.value)

    def _snapshot(self) -> Any:
        measured = self._measured()

        def by_key(named: Mapping[str, Any]) -> dict[str, Any]:
            keys = {key.rpartition(".")[2] or "plain": key for key in measured.ready_slots}
            return {keys[name]: value for name, value in named.items()}

        return dataclasses.replace(
            measured,
            ready_slots=measured.ready_slots | by_key(self._ready),
            waiting_inputs=by_key(self._waiting),
            bands=by_key(self._bands),
            outage=self._outage,
        )


def soon(ask: Callable[[], Any], timeout: float = 10.0) -> None:
    """Wait until ``ask`` answers with something true; the harness holds ``time.monotonic``.

    Raises:
        AssertionError: when ``timeout`` seconds pass without.
    """
    end = time.time() + timeout
    while not ask():
        assert time.time() < end, f"not after {timeout} s: {ask}"
        time.sleep(0.02)


@contextmanager
def consuming(services: Mapping[str, int] | None = None, **settings: Any) -> Iterator[Consuming]:
    """A worker that has no connection yet."""
    services = {"embed": 2, "classify": 1} if services is None else services
    with Harness(services, **settings).running() as harness:
        yield Consuming(harness)
