"""Celery's autoscaler for the GPU pool, in the worker's parent; it acts once a second.

It runs in the thread of the worker's loop, or in Celery's autoscaler thread if the transport has no
loop. ``cluster.membership`` waits for Redis and the broker.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from celery.worker import autoscale
from kombu.asynchronous import get_event_loop

from gw_celery import conf, errors, signals
from gw_celery.cluster import membership, queue_lengths
from gw_celery.policy import demand as policy_demand
from gw_celery.policy import scaling
from gw_celery.pool import taskpool
from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import WorkerRecord

logger = logging.getLogger(__name__)

_ROUND = 1.0
#: Factor (plus a second) within which two start-up durations count as equal.
_NEAR = 1.5


class Autoscaler(autoscale.Autoscaler):
    """Grows the pool when its services need more replicas, and drains unneeded ones.

    Bounds are in slots, Celery's unit, and are rounded up to whole replicas. For any other pool,
    the constructor returns Celery's own autoscaler.
    """

    def __new__(cls, pool: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(pool, taskpool.TaskPool):
            return autoscale.Autoscaler(pool, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        pool: taskpool.TaskPool,
        max_concurrency: int,
        min_concurrency: int = 0,
        worker: Any = None,
        keepalive: float = _ROUND,
        mutex: Any = None,
    ) -> None:
        super().__init__(pool, max_concurrency, min_concurrency, worker, keepalive, mutex)
        plan = signals.plan()
        served = plan.served if plan else ()
        self._targets = {service.key: service.target_inputs for service in served}
        self._unit = sum(plan.slots.values()) if plan else 1
        settings = conf.read(worker.app.conf)
        self._rules = scaling.Rules(
            target_util=settings.target_util,
            target_queue_time=settings.target_queue_time,
            inactivity_timeout=settings.inactivity_timeout,
            min_load=settings.min_load or 0.0,
            window=settings.scale_window,
        )
        #: Replicas that the group needed at the last decision.
        self._ordered = 0
        self._set_bounds(self._replicas(max_concurrency), self._replicas(min_concurrency))
        self._decider = scaling.Decider(self._rules, self._least, self._most)
        self._start_up = policy_demand.StartUp()
        self._services: dict[str, policy_demand.Service] = {}
        pool.autoscaler = self
        pool.scaling = snapshot.Scaling(least=self._least, most=self._most)
        self._hub: Any = None
        self._asked = threading.Event()
        self._judged: membership.Reading | None = None
        self._is_over = False

    # -- the life of the worker --

    def begin(self) -> None:
        """Publish this worker's record before the first decision, and start to read the broker."""
        worker = self.pool.snapshot()
        self.pool.cluster.tell(worker, policy_demand.size_of(worker, self._least, self._most))
        self.pool.cluster.follow(self._on_read)

    def end(self) -> None:
        """Stop deciding the size, because the worker stops."""
        with self.mutex:
            self._is_over = True
            # The worker starts no replica any more: others take its part while its inputs finish.
            self.pool.cluster.tell(self.pool.snapshot(), None)
        self._asked.set()

    def body(self) -> None:
        """Do one turn of Celery's thread, if the transport has no event loop."""
        with self.mutex:
            self.maybe_scale()
        self._asked.wait(_ROUND)
        self._asked.clear()

    def maybe_scale(self, req: Any = None) -> None:
        """Decide once after each reading; a message (``req``) causes no decision."""
        if req is not None or self._is_over:
            return
        self._hub = get_event_loop()
        reading = self.pool.cluster.latest()
        if reading is None:
            target = self._clamped(self.pool.desired_replicas)
            why = "nothing is known of the broker or the other workers: the size is kept"
            self._follow(target, why, {}, target, 1)
        elif reading is not self._judged:
            self._judged = reading
            try:
                self._judge(reading)
            except Exception:  # it would end the worker's loop
                logger.exception("the autoscaler failed and keeps the pool's size: report this bug")

    # -- operators --

    def update(self, max: int | None = None, min: int | None = None) -> tuple[int, int]:  # noqa: A002
        """Change the bounds, in slots; return them, rounded to whole replicas.

        Raises:
            ConfigurationError: for a lower bound over the upper one.
        """
        most = self._most if max is None else self._replicas(max)
        least = self._least if min is None else self._replicas(min)
        if not 0 <= least <= most or most < 1:
            raise errors.ConfigurationError(
                f"max={most * self._unit} and min={least * self._unit} slots: give both, min from "
                f"0 to max, and max from 1"
            )
        with self.mutex:
            self._set_bounds(most, least)
            self._resize(self._clamped(self.pool.desired_replicas), "its bounds were changed")
        return self.max_concurrency, self.min_concurrency

    def force_scale_up(self, n: int) -> None:
        """Grow by ``n`` slots now (Celery's ``pool_grow``), and raise the upper bound if needed.

        Replicas without work go later.
        """
        with self.mutex:
            wanted = self.pool.desired_replicas + self._replicas(n)
            self._set_bounds(max(self._most, wanted), self._least)
            self._decider.hold(time.monotonic(), wanted)
            self._resize(wanted, "an operator asked for more")

    def force_scale_down(self, n: int) -> None:
        """Shrink by ``n`` slots now (``pool_shrink``), and reduce the lower bound if needed.

        Replicas that the load needs come back later.
        """
        with self.mutex:
            wanted = max(0, self.pool.desired_replicas - self._replicas(n))
            self._set_bounds(self._most, min(self._least, wanted))
            # Forget recent needs, which would restart replicas that still drain.
            self._decider = scaling.Decider(self._rules, self._least, self._most)
            self._resize(wanted, "an operator asked for less")

    def info(self) -> dict[str, Any]:
        """Return Celery's figures in slots, and ours in replicas, under ``gw``."""
        return {**super().info(), "gw": self.pool.scaling.as_json()}

    # -- deciding --

    def _judge(self, reading: membership.Reading) -> None:
        now = time.monotonic()
        lengths = {
            service: queue_lengths.total(reading.lengths, queues)
            for service, queues in self.pool.cluster.queues.items()
            if queues and reading.lengths is not None
        }
        if lengths:  # tells the pool whether its replicas are full
            queued = {key: length.messages for key, length in lengths.items()}
            self.pool.supervisor.note_queued(queued)
        worker = self.pool.snapshot()
        self._learn(worker)
        # Taken together with the queues, because a message that moved between would count twice.
        size = policy_demand.size_of(worker, self._least, self._most)
        mine: WorkerRecord = self.pool.cluster.tell(worker, size)
        seen = {
            key: self._demand(key, mine, reading.others, lengths.get(key), now)
            for key in mine.services
        }
        group = policy_demand.group_of(mine, reading.others)
        total = self._total(seen, group, now)
        target = self._clamped(self._share.kept(now, self._part(group, total), total, self._rules))
        if reading.lengths is None:
            target = max(1, target)  # at zero, the next message would go unnoticed
        if self._decider.is_idle(now):
            # Mean rates still include earlier work, which does not explain this decision.
            why = f"no input came, waited or ran for {self._rules.inactivity_timeout:g} s"
        else:
            why = _why(seen, total, len(group))
        self._follow(target, why, seen, total, len(group))

    def _learn(self, worker: snapshot.Worker) -> None:
        """Update the duration of a start; a clear change resets the figures that depend on it."""
        self._start_up.observe(worker.replicas)
        seconds = self._start_up.seconds
        known = self._rules.start_up
        if seconds is None or known / _NEAR <= seconds + 1.0 <= known * _NEAR + 2.0:
            return
        self._rules = dataclasses.replace(self._rules, start_up=seconds)
        self._services.clear()
        self._decider.rules = self._rules

    def _total(
        self, seen: Mapping[str, snapshot.ServiceDemand], group: Sequence[WorkerRecord], now: float
    ) -> int:
        """Return the replicas that the group of workers should have together."""
        sizes = [worker.size for worker in group if worker.size is not None]
        least = sum(size.least for size in sizes)
        if self._rules.inactivity_timeout is None:
            least = max(1, least)
        # Count our own failing replicas, because no other worker would start one for them in time.
        self._decider.update(least, self._most + sum(size.capacity for size in sizes[1:]))
        # Keep the last decision until the others' records show its effect.
        self._ordered = self._decider.decide(
            now,
            sum(demand.need for demand in seen.values()),
            max(self._ordered, sum(size.replicas for size in sizes)),
            sum(demand.keep for demand in seen.values()),
            self._start_up.is_loading or any(demand.is_active for demand in seen.values()),
        )
        return self._ordered

    def _part(self, group: Sequence[WorkerRecord], total: int) -> int:
        """Return this worker's part of the group's replicas.

        Others take over replicas that fail to start here, and this worker tries them all the same.
        """
        me, *others = group
        parts = [policy_demand.part(group, total)]
        if me.size is not None and me.size.capacity < self._most:
            size = dataclasses.replace(me.size, capacity=self._most)
            whole = dataclasses.replace(me, size=size)
            parts.append(policy_demand.part([whole, *others], total))
        return max(parts)

    def _demand(
        self,
        key: str,
        mine: WorkerRecord,
        others: Sequence[WorkerRecord] | None,
        length: queue_lengths.Length | None,
        now: float,
    ) -> snapshot.ServiceDemand:
        if (service := self._services.get(key)) is None:
            service = policy_demand.Service(key, self._targets.get(key, 1), self._rules, now)
            self._services[key] = service
        consumers = None if length is None else length.consumers
        if consumers is not None and not mine.services[key].slots:
            consumers += 1  # this worker will be one, but its queue is closed now
        sharing = policy_demand.sharing(mine, others, key)
        queued = None if length is None else length.messages
        return service.observe(now, mine, sharing, queued=queued, consumers=consumers)

    def _follow(
        self,
        target: int,
        why: str,
        seen: Mapping[str, snapshot.ServiceDemand],
        total: int,
        workers: int,
    ) -> None:
        """Set the size of the pool, and publish the reason."""
        self.pool.scaling = snapshot.Scaling(
            least=self._least,
            most=self._most,
            desired=target,
            actual=self.pool.desired_replicas,
            total=total,
            workers=workers,
            why=why,
            start_up=self._start_up.seconds,
            services=seen,
        )
        self._resize(target, why)

    def _resize(self, replicas: int, why: str) -> None:
        actual = self.pool.desired_replicas
        self.pool.cluster.at_zero(is_at_zero=replicas == 0)
        if replicas == actual:
            return
        logger.info("the pool goes from %d to %d replicas: %s", actual, replicas, why)
        slots = replicas * self._unit - self.pool.limit
        if slots > 0:
            self.pool.grow(slots)
        else:
            self.pool.shrink(-slots)
        self.pool.maintain_pool()

    def _on_read(self) -> None:
        """Schedule a decision while the reading is fresh; called in the membership's thread."""
        if self._is_over:
            return
        if self._hub is not None:
            self._hub.call_soon(self.maybe_scale)
            self.pool.wake()  # the loop runs it only at its next event
        else:
            self._asked.set()

    def _replicas(self, slots: int) -> int:
        return math.ceil(slots / self._unit)

    def _set_bounds(self, most: int, least: int) -> None:
        self._most, self._least = most, least
        self._share = scaling.Share()
        self._ordered = 0
        self.max_concurrency, self.min_concurrency = most * self._unit, least * self._unit

    def _clamped(self, replicas: int) -> int:
        return max(self._least, min(self._most, replicas))


def _figure(value: float) -> str:
    """Format three digits, or all digits of a large number: 68600 instead of 6.86e+04."""
    if 0 < value < 0.001:
        return "<0.001"
    return format(value, ".0f" if value >= 100 else ".3g")


def _why(seen: Mapping[str, snapshot.ServiceDemand], total: int, workers: int) -> str:
    """Describe the services that need replicas."""
    told = [
        f"{key or 'plain tasks'} needs {_figure(demand.need)} ({_figure(demand.rate)}/s come, "
        f"{_figure(demand.waiting)} wait, a replica does "
        f"{'?' if demand.score is None else _figure(demand.score)}/s)"
        for key, demand in seen.items()
        if demand.need > 0
    ]
    among = f"; {total} in all among {workers} workers" if workers > 1 else ""
    return ("; ".join(told) or "nothing waits or comes") + among
