"""The pool as Celery knows it: what a worker calls, and when.

The unit of everything that Celery counts is the slot, room for one input in flight.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Iterable
from typing import Unpack

from celery import Celery
from celery.concurrency.base import BasePool
from celery.worker import state
from kombu.asynchronous import Hub

from gw_celery import conf, signals
from gw_celery.cluster import membership
from gw_celery.declare import services
from gw_celery.policy import speed_bands
from gw_celery.pool import (
    dead_letters,
    driver,
    origin,
    replica,
    request,
    supervisor,
)
from gw_celery.protocol import frames
from gw_celery.protocol.snapshot import Scaling, Worker
from gw_celery.runtime import fatal_exit
from gw_celery.transport import find
from gw_celery.worker import gate, health, serving, start_notices

signals.listen()

logger = logging.getLogger(__name__)

#: Grace of the children at the end, over the bounds of their exit hooks: the supervisor's is less.
_LEAVE_MARGIN = 15.0
_SHUT_DOWN = "Worker exited prematurely: the worker shut down."


class TaskPool(BasePool):
    """Replicas behind Celery's pool interface."""

    # Acknowledgements are written by Celery in the thread that runs the callbacks.
    uses_semaphore = False
    task_join_will_block = True

    def __init__(
        self,
        limit: int | None = None,
        *,
        maxtasksperchild: int | None = None,
        max_memory_per_child: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(limit, **options)
        plan = signals.plan()
        settings = conf.read(self.app.conf) if plan is None else plan.settings
        slots = plan.slots if plan else {services.PLAIN: 1}
        self._plan = plan
        #: Opens and closes the worker's queues; the consumer's step attaches itself.
        self.gate: gate.Gate | None = None
        #: It was to stop in the middle of a move of a request.
        self._stop_is_due = False
        #: When each tick of beat came last.
        self._ticked: dict[str, float] = {}
        self.limit = limit or 1
        self._setup = replica.Setup(
            settings=settings,
            slots=slots,
            first={},
            benchmarked=plan.benchmarked if plan else {},
            allotment=plan.allotment if plan else None,
            probes=plan.probes if plan else (),
            max_tasks=maxtasksperchild,
            max_bytes=(max_memory_per_child or 0) * 1024 or None,
        )
        self.supervisor: supervisor.Supervisor
        self._dead: dead_letters.DeadLetters | None = None
        #: What the worker tells the others, and learns of them.
        self.cluster: membership.Membership
        #: Where the broker prefers the quicker of several workers.
        self.bands: speed_bands.Bands | None = None
        self._driver: driver.Driver
        #: What our autoscaler saw and decided last; ``None`` where there is none.
        self.scaling: Scaling | None = None
        #: What a platform's own probes ask.
        self.health = health.Health(settings, plan.service_queues if plan else {})

    # -- size --

    @property
    def num_processes(self) -> int:
        """Slots that were asked for; never 0, which Celery reads as "without limit".

        Not those that are READY: Celery's autoscaler would ask for more while a replica loads.
        """
        return max(1, self.limit)

    @property
    def desired_replicas(self) -> int:
        return self._replicas_for(self.limit)

    @property
    def hostname(self) -> str:
        return str(self.options["initargs"][1])

    @property
    def is_stopping(self) -> bool:
        return self._state in (self.CLOSE, self.TERMINATE)

    def grow(self, n: int = 1) -> None:
        """Add ``n`` slots, in whole replicas, or as many as there are devices for."""
        if (why := self.refusal(self.limit + n)) is not None:
            logger.error("the pool grows by less than %d slots: %s", n, why)
        self._resize(self.limit + n)

    def refusal(self, slots: int) -> str | None:
        """Say why this worker cannot have so many slots; ``None`` when it can."""
        allotment = self._setup.allotment
        return None if allotment is None else allotment.refusal(self._replicas_for(slots))

    def shrink(self, n: int = 1) -> None:
        """Take away ``n`` slots, in whole replicas, by draining; never interrupts an input."""
        self._resize(self.limit - n)

    def restart(self, number: int | None = None) -> None:
        """Replace the child of one replica, or of all, and start those that were held.

        Inputs in flight finish. Celery calls it without a number.
        """
        self.supervisor.restart(number)

    def hold(self, number: int | None) -> None:
        """Let one replica, or all, finish and stay stopped until they are restarted."""
        self.supervisor.hold(number)

    def maintain_pool(self, *args: object, **kwargs: object) -> None:
        self.supervisor.tick()

    # -- the life of the worker --

    def on_start(self) -> None:
        with fatal_exit.fatal_errors():
            self.health.start()
        app, hostname = self.options["initargs"]
        self.cluster = membership.Membership(
            app,
            hostname,
            _queues(app, self._plan),
            _limited(self._plan),
            self._setup.settings.worker_ttl,
            self.wake,
        )
        first = {
            "version": frames.version(),
            "worker": self.cluster.start_id if self.cluster.lost else None,
            "app": origin.find(app),
            "changes": origin.changes(app),
            "hostname": hostname,
            "path": list(sys.path),
            "parent": os.getpid(),
            "queues": list(self._plan.queues) if self._plan else [],
        }
        setup = dataclasses.replace(self._setup, first=first)
        if setup.settings.dead_letter_queue:
            self._dead = dead_letters.DeadLetters(app, setup.settings, hostname)
        self.supervisor = supervisor.Supervisor(
            setup, self, self.cluster.counts, self._dead, self.cluster.lost
        )
        self._driver = driver.Driver(self)
        if self._plan is not None:
            queues = self._plan.service_queues
            self.bands = _bands(app, self.cluster, queues.values())
            self.gate = gate.Gate(app.amqp.queues, queues, self)
            self.gate.close_all()
            start_notices.log(app, self._plan)
        self._resize(self.limit)
        self.supervisor.tick()
        self.observe()
        self.cluster.begin()
        self._driver.start()

    def register_with_event_loop(self, hub: Hub) -> None:
        """Called at every start of the consumer, when the hub has forgotten us."""
        self._driver.attach(hub)

    def on_apply(
        self,
        target: object,
        args: request.TaskArgs,
        kwargs: object,
        **options: Unpack[request.Options],
    ) -> request.PoolRequest:
        """Take one input; see ``celery.worker.request`` for the callbacks in ``options``."""
        soft, hard = self.options.get("soft_timeout"), self.options.get("timeout")
        options["soft_timeout"] = options.get("soft_timeout") or soft
        options["timeout"] = options.get("timeout") or hard
        task = self.app.tasks.get(args[0])
        service = getattr(task, "gw_service", None)
        key = services.PLAIN if service is None else service.key
        options["gathers"] = service is not None and task.gw_method.batched is not None
        return self.supervisor.submit(args, key, options)

    def terminate_job(self, pid: int, signal: object = None) -> None:
        """Do nothing: a pid names a replica. Celery calls ``PoolRequest.terminate`` next."""

    def flush(self) -> None:
        """Drop what has not started; called when the broker is lost, and at every shutdown."""
        self.supervisor.forget_waiting()

    def on_close(self) -> None:
        self.supervisor.close()

    def on_stop(self) -> None:
        """Wait for every input in flight, then let the children leave."""
        if self._driver.is_over:
            return
        if self.supervisor.is_interrupted:  # by Celery's handler of a cold shutdown
            self._stop_is_due = True
            return
        settings = self._setup.settings
        self.supervisor.close()
        if state.should_terminate:
            self.supervisor.give_up_unbegun()
            bound = grace = settings.cancel_timeout
        else:
            bound, grace = settings.shutdown_timeout, 2 * settings.exit_timeout + _LEAVE_MARGIN
        if not self._driver.wait(lambda: not self.supervisor.requests.in_flight(), bound):
            logger.error(
                "%d inputs are still running after %.0f s; their replicas are killed (setting "
                "gw_shutdown_timeout)",
                self.supervisor.requests.in_flight(),
                bound,
            )
            self.supervisor.kill(_SHUT_DOWN)
        # What was given back to the broker, or answered at its limit, is about to go.
        self._driver.wait(lambda: not self.supervisor.requests.held(), settings.cancel_timeout)
        self.supervisor.leave()
        self._driver.wait(self.supervisor.is_empty, grace)
        self._finish()

    def on_terminate(self) -> None:
        if self._stop_is_due:
            self.on_stop()
        self._finish()

    # -- what beat has every worker do --

    def probe_tick(self) -> None:
        """Call the probes that are due now; they are called without it, too."""
        self._ticked["probe"] = request.now()
        self.supervisor.probe_tick()

    def benchmark_tick(self) -> None:
        """Have every replica measured again, one after the other, when it has nothing to do."""
        self._ticked["benchmark"] = request.now()
        self.supervisor.measure_again()

    # -- what is seen from outside --

    def snapshot(self) -> Worker:
        """Return the worker as it is now; see ``protocol.snapshot.Source``."""
        return self.supervisor.snapshot()

    def _get_info(self) -> dict[str, object]:
        options, worker = self.options, self.snapshot().as_json()
        return {
            **super()._get_info(),
            "max-concurrency": self.limit,
            "processes": [replica["pid"] for replica in worker["replicas"] if replica["pid"]],
            "max-tasks-per-child": self._setup.max_tasks or "N/A",
            "put-guarded-by-semaphore": False,
            "timeouts": (options.get("soft_timeout") or 0, options.get("timeout") or 0),
            "writes": "N/A",
            "gw_replicas": list(worker["replicas"]),
            "gw_outage": worker["outage"],
            "gw_tallies": worker["tallies"],
            "gw_scores": worker["scores"],
            "gw_tick_ages": {kind: request.now() - at for kind, at in self._ticked.items()},
        }

    # -- driving --

    def poll(self) -> None:
        """Read what children have reported and judge limits, now."""
        self._driver.poll()

    def wake(self) -> None:
        """Have the worker's loop turn now; from any thread."""
        self.supervisor.wake()

    def _finish(self) -> None:
        if self._driver.is_over:
            return
        self._driver.end()
        self.supervisor.kill(_SHUT_DOWN)
        self._driver.detach()
        self.supervisor.release()
        self.health.close()
        for thread in (self._dead, self.cluster):
            if thread is not None:
                thread.close()

    def _resize(self, slots: int) -> None:
        if (allotment := self._setup.allotment) is not None:
            slots = min(slots, allotment.most * self._setup.slots_per_replica)
        self.limit = max(0, slots)
        self.supervisor.resize(self.desired_replicas)

    def _replicas_for(self, slots: int) -> int:
        return math.ceil(slots / self._setup.slots_per_replica)

    def slots_changed(self) -> None:
        """There are more, or fewer, slots or inputs that wait for one."""
        if self.gate is not None and self._state == self.RUN:
            self.gate.request()

    def observe(self) -> None:
        """Once a second: look at what there is, and let others see it."""
        self.supervisor.observe()
        worker = self.snapshot()
        self.cluster.observe(worker)
        scores = {service: score.value for service, score in worker.scores.items()}
        if self.bands is not None and self.bands.follow(scores, self.cluster.others, request.now()):
            self.slots_changed()
        self.health.beat(worker)


def _queues(app: Celery, plan: serving.Plan | None) -> dict[str, list[str]]:
    """The queues of each service; those of plain tasks are together."""
    keys = [services.PLAIN] if plan is None else plan.slots
    queues: dict[str, list[str]] = {key: [] for key in keys}
    names = app.amqp.queues.consume_from if plan is None else plan.queues
    of_services = {} if plan is None else plan.service_queues
    for name in names:
        queues[of_services.get(name, services.PLAIN)].append(name)
    return queues


def _limited(plan: serving.Plan | None) -> dict[str, dict[str, int]]:
    """The queues whose callers are told how long an input would wait: services and their slots."""
    if plan is None:
        return {}
    queues = {service.queue for service in plan.served if service.key in plan.queue_times}
    return {
        queue: {
            service.key: service.max_inputs for service in plan.served if service.queue == queue
        }
        for queue in queues
    }


def _bands(
    app: Celery, cluster: membership.Membership, keys: Iterable[str]
) -> speed_bands.Bands | None:
    """The bands of a worker; ``None`` where the broker has no priorities, or others are unknown."""
    with app.connection_for_read() as connection:
        if cluster.is_alone or not find.is_rabbitmq(connection):
            return None
    cluster.read_others()
    return speed_bands.Bands(keys)
