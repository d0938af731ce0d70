"""Celery's autoscaler for the GPU pool: sizes it once a second, in whole replicas.

Everything here runs in the thread of the worker's loop, or in Celery's autoscaler thread where the
transport has no loop; what waits for Redis and the broker is in ``cluster.membership``.
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
#: A start-up that differs by less than this factor, and a second, is the same.
_NEAR = 1.5


class Autoscaler(autoscale.Autoscaler):
    """Grows the pool when its services need more replicas, and drains those that none needs.

    Bounds are in slots, as everything that Celery counts, and rounded up to whole replicas. On any
    other pool this is Celery's own autoscaler.
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
        #: Replicas that the group was last found to need.
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
        """Start to look at the broker, known to the other workers before the first decision."""
        worker = self.pool.snapshot()
        self.pool.cluster.tell(worker, policy_demand.size_of(worker, self._least, self._most))
        self.pool.cluster.follow(self._on_read)

    def end(self) -> None:
        """The worker stops: its size is its pool's own business from now on."""
        with self.mutex:
            self._is_over = True
            # It starts no replica any more: others have its part, while its last inputs run.
            self.pool.cluster.tell(self.pool.snapshot(), None)
        self._asked.set()

    def body(self) -> None:
        """One turn of Celery's thread, where the transport has no event loop."""
        with self.mutex:
            self.maybe_scale()
        self._asked.wait(_ROUND)
        self._asked.clear()

    def maybe_scale(self, req: Any = None) -> None:
        """Decide when something new has been read, once a second; a message decides nothing."""
        if req is not None or self._is_over:
            return
        self._hub = get_event_loop()
        reading = self.pool.cluster.latest()
        if reading is None:
            target = self._clamped(self.pool.snapshot().desired)
            why = "nothing is known of the broker or the other workers: the size is kept"
            self._follow(target, why, {}, target, 1)
        elif reading is not self._judged:
            self._judged = reading
            try:
                self._judge(reading)
            except Exception:  # out of here it would end the worker's loop
                logger.exception("the autoscaler failed and keeps the pool's size: report this bug")

    # -- what operators steer and see --

    def update(self, max: int | None = None, min: int | None = None) -> tuple[int, int]:  # noqa: A002
        """Change the bounds, in slots; returns them, in whole replicas.

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
            self._resize(self._clamped(self.pool.snapshot().desired), "its bounds were changed")
        return self.max_concurrency, self.min_concurrency

    def force_scale_up(self, n: int) -> None:
        """Grow by ``n`` slots now, over the upper bound if need be; what is not needed goes later.

        Celery's ``pool_grow``.
        """
        with self.mutex:
            wanted = self.pool.snapshot().desired + self._replicas(n)
            self._set_bounds(max(self._most, wanted), self._least)
            self._decider.hold(time.monotonic(), wanted)
            self._resize(wanted, "an operator asked for more")

    def force_scale_down(self, n: int) -> None:
        """Shrink by ``n`` slots now, under the lower bound if need be; what is needed comes back.

        Celery's ``pool_shrink``.
        """
        with self.mutex:
            wanted = max(0, self.pool.snapshot().desired - self._replicas(n))
            self._set_bounds(self._most, min(self._least, wanted))
            # What was needed until now is no reason to start again what is still draining.
            self._decider = scaling.Decider(self._rules, self._least, self._most)
            self._resize(wanted, "an operator asked for less")

    def info(self) -> dict[str, Any]:
        """Celery's figures, in slots, and ours, in replicas, under ``gw``."""
        return {**super().info(), "gw": self.pool.scaling.as_json()}

    # -- deciding --

    def _judge(self, reading: membership.Reading) -> None:
        now = time.monotonic()
        lengths = {
            service: queue_lengths.total(reading.lengths, queues)
            for service, queues in self.pool.cluster.queues.items()
            if queues and reading.lengths is not None
        }
        if lengths:  # by which the pool knows that its replicas are full
            queued = {key: length.messages for key, length in lengths.items()}
            self.pool.supervisor.note_queued(queued)
        worker = self.pool.snapshot()
        self._learn(worker)
        # Seen together with the queues: what has moved from there since would be counted twice.
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
            target = max(1, target)  # with none, the next message would not be noticed
        if self._decider.is_idle(now):
            # Rates are means over some time and not yet 0: they are no reason for what is done.
            why = f"no input came, waited or ran for {self._rules.inactivity_timeout:g} s"
        else:
            why = _why(seen, total, len(group))
        self._follow(target, why, seen, total, len(group))

    def _learn(self, worker: snapshot.Worker) -> None:
        """Follow how long a start takes; what depends on it begins anew when that has changed."""
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
        """Replicas that the group of workers should have together."""
        sizes = [worker.size for worker in group if worker.size is not None]
        least = sum(size.least for size in sizes)
        if self._rules.inactivity_timeout is None:
            least = max(1, least)
        # One's own replicas that fail are not given up: others would start with no patience.
        self._decider.update(least, self._most + sum(size.capacity for size in sizes[1:]))
        # What was ordered a second ago others have not told yet: that does not take it back.
        self._ordered = self._decider.decide(
            now,
            sum(demand.need for demand in seen.values()),
            max(self._ordered, sum(size.replicas for size in sizes)),
            sum(demand.keep for demand in seen.values()),
            self._start_up.is_loading or any(demand.is_active for demand in seen.values()),
        )
        return self._ordered

    def _part(self, group: Sequence[WorkerRecord], total: int) -> int:
        """This worker's replicas of those of the group.

        One that fails to start is taken over by others, and is tried here all the same.
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
            consumers += 1  # it would be one, and its queue is closed
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
        """Have the pool as large as was decided; others see why."""
        self.pool.scaling = snapshot.Scaling(
            least=self._least,
            most=self._most,
            desired=target,
            actual=self.pool.snapshot().desired,
            total=total,
            workers=workers,
            why=why,
            start_up=self._start_up.seconds,
            services=seen,
        )
        self._resize(target, why)

    def _resize(self, replicas: int, why: str) -> None:
        worker = self.pool.snapshot()
        self.pool.cluster.at_zero(is_at_zero=replicas == 0)
        if replicas == worker.desired:
            return
        logger.info("the pool goes from %d to %d replicas: %s", worker.desired, replicas, why)
        slots = replicas * self._unit - worker.desired_slots
        if slots > 0:
            self.pool.grow(slots)
        else:
            self.pool.shrink(-slots)
        self.pool.maintain_pool()

    def _on_read(self) -> None:
        """Called in the thread: have it judged now, while it is true."""
        if self._is_over:
            return
        if self._hub is not None:
            self._hub.call_soon(self.maybe_scale)
            self.pool.wake()  # the loop looks at it when something else happens
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
    """Three digits, and all of a large number: 68600 tokens, not 6.86e+04; no dust."""
    if 0 < value < 0.001:
        return "<0.001"
    return format(value, ".0f" if value >= 100 else ".3g")


def _why(seen: Mapping[str, snapshot.ServiceDemand], total: int, workers: int) -> str:
    """Say what the services need, those that need nothing left out."""
    told = [
        f"{key or 'plain tasks'} needs {_figure(demand.need)} ({_figure(demand.rate)}/s come, "
        f"{_figure(demand.waiting)} wait, a replica does "
        f"{'?' if demand.score is None else _figure(demand.score)}/s)"
        for key, demand in seen.items()
        if demand.need > 0
    ]
    among = f"; {total} in all among {workers} workers" if workers > 1 else ""
    return ("; ".join(told) or "nothing waits or comes") + among
