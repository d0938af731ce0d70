"""Celery's view of the pool, in the worker's parent: the methods that a worker calls.

Celery counts slots; a slot is room for one input in flight. The worker's event loop drives the
pool, or a thread of the pool if the transport has no event loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Unpack

from celery import Celery
from celery.concurrency.base import BasePool
from celery.worker import autoscale, state
from kombu.asynchronous import Hub, get_event_loop
from kombu.asynchronous.timer import Entry

from gw_celery import conf, errors, signals
from gw_celery.cluster import membership
from gw_celery.declare import services
from gw_celery.policy import speed_bands
from gw_celery.pool import dead_letters, origin, requests, supervisor
from gw_celery.protocol import frames
from gw_celery.protocol.snapshot import Scaling, Worker
from gw_celery.runtime import lifecycle
from gw_celery.transport import find
from gw_celery.worker import consumer, gate, health
from gw_celery.worker import plan as worker_plan

signals.listen()

logger = logging.getLogger(__name__)

#: Additional seconds for leaving children, after their exit hooks; above the supervisor's margin.
_LEAVE_MARGIN = 15.0
_TICK = 1.0
_SHUT_DOWN = "Worker exited prematurely: the worker shut down."


class TaskPool(BasePool):
    """Celery's pool interface over replicas; select it with ``worker_pool`` or ``gw worker``.

    Args:
        limit: slots, Celery's concurrency.
        maxtasksperchild: inputs after which a child is replaced.
        max_memory_per_child: resident memory in KiB after which a child is replaced.
        options: further options of Celery's ``BasePool``.
    """

    # Celery writes acknowledgements in the thread that runs the callbacks.
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
        #: What the worker serves. ``worker_init`` decides it, which embedded workers do not send.
        self.plan = signals.plan() or worker_plan.Plan(
            registries=(), served=(), settings=conf.read(self.app.conf), pool=worker_plan.GPU_POOL
        )
        self._slots_per_replica = sum(self.plan.slots.values())
        self.max_tasks = maxtasksperchild
        #: Resident bytes after which a child is replaced.
        self.max_bytes = (max_memory_per_child or 0) * 1024 or None
        #: Opens and closes the worker's queues; a bootstep attaches it to the consumer.
        self.gate: gate.Gate | None = None
        self._is_stopping = False
        #: Whether a cold shutdown began while a request was moved, or while the pool stops.
        self._stop_is_due = False
        #: Time of the last tick of beat, by kind.
        self._ticked: dict[str, float] = {}
        self.limit = limit or 1
        self.supervisor: supervisor.Supervisor
        self._dead: dead_letters.DeadLetters | None = None
        #: The exchange of records with other workers.
        self.cluster: membership.Membership
        #: Speed bands, on brokers that can prefer the faster of several workers.
        self.bands: speed_bands.Bands | None = None
        self._hub: Hub | None = None
        self._tick_timer: Entry | None = None
        self._limit_timer: Entry | None = None
        self._limit_due = math.inf
        #: Number of revocations at the last check.
        self._revoked = 0
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        #: Our autoscaler, if there is one. The pool starts and ends it: Celery does so only on a
        #: transport without an event loop.
        self.autoscaler: autoscale.Autoscaler | None = None
        #: The last observation and decision of the autoscaler.
        self.scaling: Scaling | None = None
        #: The HTTP endpoints for the probes of a platform.
        self.health = health.Health(self.plan.settings, self.plan.service_queues)

    # -- size --

    @property
    def num_processes(self) -> int:
        """The requested slots, at least 1, because Celery reads 0 as "without limit".

        With the READY slots instead, Celery's autoscaler would add more while a replica loads.
        """
        return max(1, self.limit)

    @property
    def desired_replicas(self) -> int:
        return self._replicas_for(self.limit)

    @property
    def most_slots(self) -> int:
        """The slots of as many replicas as this worker can have."""
        return self.plan.most_replicas * self._slots_per_replica

    @property
    def hostname(self) -> str:
        return str(self.options["initargs"][1])

    def grow(self, n: int = 1) -> None:
        """Add ``n`` slots, in whole replicas, up to the number that the devices allow."""
        if (why := self.refusal(self.limit + n)) is not None:
            logger.error("the pool grows by fewer than %d slots: %s", n, why)
        self._resize(self.limit + n)

    def refusal(self, slots: int) -> str | None:
        """Return why this worker cannot have that many slots; ``None`` if it can."""
        return self.plan.refusal(self._replicas_for(slots))

    def shrink(self, n: int = 1) -> None:
        """Remove ``n`` slots, in whole replicas, by draining; no input is interrupted."""
        self._resize(self.limit - n)

    def restart(self, number: int | None = None) -> None:
        """Replace the child of one replica, or of all (``None``), and start those on hold."""
        self.supervisor.restart(number)

    def hold(self, number: int | None) -> None:
        """Drain one replica, or all (``None``); they stay stopped until a restart."""
        self.supervisor.hold(number)

    def maintain_pool(self, *args: object, **kwargs: object) -> None:
        self.supervisor.tick()

    # -- the life of the worker --

    def on_start(self) -> None:
        with lifecycle.fatal_errors():
            self.health.start()
        app, hostname = self.options["initargs"]
        self.cluster = membership.Membership(
            app,
            hostname,
            _queues(app, self.plan),
            _limited(self.plan),
            self.plan.settings.worker_ttl,
            self.wake,
        )
        first = {
            "version": frames.version(),
            "worker": self.cluster.early_start,
            "app": origin.find(app),
            "changes": origin.changes(app),
            "hostname": hostname,
            "path": list(sys.path),
            "parent": os.getpid(),
            "queues": list(self.plan.queues),
        }
        if self.plan.settings.dead_letter_queue:
            self._dead = dead_letters.DeadLetters(app, self.plan.settings, hostname)
        self.supervisor = supervisor.Supervisor(self, first, self._dead)
        if signals.plan() is not None:
            queues = self.plan.service_queues
            with app.connection_for_read() as connection:
                has_priorities = find.is_rabbitmq(connection)
            if has_priorities and not self.cluster.is_alone:
                self.cluster.read_others()
                self.bands = speed_bands.Bands(queues.values())
            self.gate = gate.Gate(app.amqp.queues, queues, self)
            worker_plan.log_notices(app, self.plan)
        self.cluster.holds.in_use = self.supervisor.requests.holds
        self._resize(self.limit)
        self.supervisor.tick()
        self.observe()
        self.cluster.begin()
        if get_event_loop() is None:
            self._thread = threading.Thread(target=self._run, name="gw-pool", daemon=True)
            self._thread.start()
        if self.autoscaler is not None:
            self.autoscaler.begin()

    def register_with_event_loop(self, hub: Hub) -> None:
        """Connect to the hub at every start of the consumer, because each start resets the hub."""
        self._hub = hub
        hub.add_reader(self.supervisor.sockets.fileno(), self._on_readable)
        # Revocations arrive between two turns of the hub: check for them in each turn.
        hub.on_tick.add(self._withdraw)
        # After a lost connection, Celery 5.7 has cancelled our timers, and 5.6 all timers.
        for timer in (self._tick_timer, self._limit_timer):
            if timer is not None:
                timer.cancel()
        self._tick_timer = hub.call_repeatedly(_TICK, self._on_tick)
        self._limit_timer = None
        self._arm()

    def on_apply(
        self,
        target: object,
        args: requests.TaskArgs,
        kwargs: object,
        **options: Unpack[requests.Options],
    ) -> requests.PoolRequest:
        """Accept an input; ``celery.worker.request`` defines the callbacks in ``options``."""
        soft, hard = self.options.get("soft_timeout"), self.options.get("timeout")
        options["soft_timeout"] = options.get("soft_timeout") or soft
        options["timeout"] = options.get("timeout") or hard
        task = self.app.tasks.get(args[0])
        service = getattr(task, "gw_service", None)
        key = services.PLAIN if service is None else service.key
        options["gathers"] = service is not None and task.gw_method.batched is not None
        return self.supervisor.submit(args, key, options)

    def terminate_job(self, pid: int, signal: object = None) -> None:
        """Do nothing: the pid is a whole child's. Celery calls ``PoolRequest.terminate`` next.

        Raises:
            ResultsUnavailable: if Celery could not store that the input was terminated, and would
                fail halfway: the caller of the command gets the reason.
        """
        if reason := self.supervisor.outage():
            raise errors.ResultsUnavailable(f"{reason}; terminate it again after the outage")

    def flush(self) -> None:
        """React to a lost broker: keep what is held; release what the broker delivers again.

        Celery calls this in a warm shutdown, too, in which ``on_stop`` gives them back.
        """
        if self._state != self.RUN:
            return
        if self.cluster.has_holds:
            self.supervisor.keep_or_abandon()
        else:
            self.supervisor.forget_waiting()

    def on_close(self) -> None:
        # ``on_stop`` may run in a signal handler, where this would wait for the interrupted code.
        if self.autoscaler is not None:
            self.autoscaler.end()
        self.supervisor.close()

    def on_stop(self) -> None:
        """Give back what has not begun, wait for the rest, then let the children leave."""
        if self._is_over.is_set():
            return
        if self._is_stopping or self.supervisor.is_interrupted:
            # Called by the signal handler of a cold shutdown: the interrupted code goes on first.
            self._stop_is_due = True
            return
        settings, self._is_stopping = self.plan.settings, True
        self.supervisor.close()
        self.supervisor.give_back()
        if not state.should_terminate:
            grace = 2 * settings.exit_timeout + _LEAVE_MARGIN
            self._end_inputs("gw_shutdown_timeout", settings.shutdown_timeout, grace)
        if state.should_terminate:
            self._stop_is_due = False
            self.supervisor.give_up_unbegun()
            self._end_inputs("gw_cancel_timeout", settings.cancel_timeout, settings.cancel_timeout)
        self._finish()

    def _end_inputs(self, setting: str, bound: float, grace: float) -> None:
        """Wait for all inputs, then for the children; return early if the shutdown becomes cold.

        Args:
            setting: the setting that has ``bound``.
            bound: seconds after which inputs that still run are given back.
            grace: seconds that the children then have to leave.
        """
        inputs = self.supervisor.requests
        logger.info(
            "%d inputs have %.0f s to end (setting %s); those that have not begun go back to the "
            "broker",
            *(inputs.unsettled(), bound, setting),
        )
        if not self._wait(lambda: not inputs.unsettled(), bound) and not self._stop_is_due:
            logger.warning(
                "%d inputs still run %.0f s after the stop began (setting %s): they are given "
                "back, or fail if they were acknowledged, and their children are killed",
                *(inputs.unsettled(), bound, setting),
            )
            self.supervisor.interrupt(_SHUT_DOWN)
        end = time.monotonic() + grace
        # Inputs that were returned, or answered at a limit, may still be in children for a moment.
        self._wait(lambda: not inputs.held(), self.plan.settings.cancel_timeout)
        self._wait(lambda: not inputs.postponed, min(bound, self.plan.settings.store_timeout))
        self.supervisor.give_up_answers()
        if not self._stop_is_due:
            self.supervisor.leave()
            self._wait(lambda: not self.supervisor.children(), end - time.monotonic())

    def on_terminate(self) -> None:
        if self._stop_is_due:
            self.on_stop()
        self._finish()

    # -- ticks of beat --

    def probe_tick(self) -> None:
        """Record that beat runs; the probes follow their own periods, with or without it."""
        self._ticked["probe"] = time.monotonic()

    def benchmark_tick(self) -> None:
        """Make all replicas measure again, one after the other, when they are idle."""
        self._ticked["benchmark"] = time.monotonic()
        with self.supervisor.lock:
            self.supervisor.scores.ask_again()

    # -- views for operators --

    def snapshot(self) -> Worker:
        """Return the current state of the worker; safe from any thread."""
        pool = self.supervisor
        with pool.lock:
            slots, now = pool.slots, time.monotonic()
            ready, table = pool.ready_by_service(), pool.requests.table
            return Worker(
                hostname=self.hostname,
                desired=self.desired_replicas,
                desired_slots=self.limit,
                open_queues=self.gate.open_queues() if self.gate else (),
                closed_queues=self.gate.closed_queues() if self.gate else (),
                bands=self.bands.names() if self.bands else {},
                is_stopping=self._state in (self.CLOSE, self.TERMINATE),
                replicas=tuple(
                    filled.as_snapshot(self._slots_per_replica, now) for filled in pool.replicas
                ),
                ready_slots={service: ready[service] * slots[service] for service in slots},
                waiting=len(table.queue),
                waiting_inputs=table.queue.by_service(),
                tallies=table.tallies(),
                outage=pool.outage(),
                broker_outage=self.cluster.holds.outage,
                scores=pool.scores.as_snapshot(now),
                scaling=self.scaling,
            )

    def _get_info(self) -> dict[str, object]:
        options, worker = self.options, self.snapshot().as_json()
        return {
            **super()._get_info(),
            "max-concurrency": self.limit,
            "processes": [replica["pid"] for replica in worker["replicas"] if replica["pid"]],
            "max-tasks-per-child": self.max_tasks or "N/A",
            "put-guarded-by-semaphore": False,
            "timeouts": (options.get("soft_timeout") or 0, options.get("timeout") or 0),
            "writes": "N/A",
            "gw_replicas": list(worker["replicas"]),
            "gw_outage": worker["outage"],
            "gw_tallies": worker["tallies"],
            "gw_scores": worker["scores"],
            "gw_tick_ages": {kind: time.monotonic() - at for kind, at in self._ticked.items()},
        }

    # -- the loop --

    def poll(self) -> None:
        """Read reports and enforce limits now, unless the pool has its own thread."""
        if self._thread is None:
            self.supervisor.poll()

    def wake(self) -> None:
        """Make the worker's loop turn now; safe from any thread."""
        self.supervisor.sockets.wake()

    def _wait(self, is_done: Callable[[], bool], timeout: float) -> bool:
        """Drive the pool until ``is_done()``, because the hub of a stopping worker stands still."""
        end = time.monotonic() + timeout
        hub = get_event_loop()
        while not (is_done() or self._stop_is_due) and time.monotonic() < end:
            self.supervisor.give_back()
            if self._thread is not None:
                self._is_over.wait(0.02)
                continue
            self.supervisor.poll(0.1)
            self.supervisor.tick()
            if hub is not None:
                consumer.run_meanwhile(hub)
            self.observe()
        self.observe()
        return is_done()

    def _on_readable(self) -> None:
        with _surviving():
            self.supervisor.poll()
        self._arm()
        if self.cluster.holds.is_lost and self._state == self.RUN:
            # Celery then forgets what it has reserved, and calls ``flush``.
            raise ConnectionError("this worker was declared lost: it connects again")

    def _withdraw(self) -> None:
        """Take revoked inputs out of the batches that they wait for."""
        if len(state.revoked) != self._revoked:
            self._revoked = len(state.revoked)
            with self.supervisor.lock:
                self.supervisor.requests.withdraw()

    def _on_tick(self) -> None:
        self._step()
        self._arm()

    def _arm(self) -> None:
        """Set a timer of the hub for the next limit, if it is before the next tick."""
        now, due = time.monotonic(), self.supervisor.next_deadline()
        is_armed = self._limit_timer is not None and now < self._limit_due <= due
        if self._hub is None or is_armed or due - now >= _TICK:
            return
        if self._limit_timer is not None:
            self._limit_timer.cancel()
        self._limit_due = due
        self._limit_timer = self._hub.call_later(max(0.0, due - now), self._on_readable)

    def _run(self) -> None:
        """Drive the pool in its own thread, for transports without an event loop."""
        while not self._is_over.is_set():
            wait = self.supervisor.next_deadline() - time.monotonic()
            self._step(min(_TICK, max(0.0, wait)))

    def _step(self, timeout: float = 0.0) -> None:
        with _surviving():
            self.supervisor.poll(timeout)
            with self.supervisor.lock:  # also inputs that have expired
                self.supervisor.requests.withdraw()
            self.supervisor.tick()
            self.observe()

    def _finish(self) -> None:
        if self._is_over.is_set():
            return
        self._is_over.set()
        self.supervisor.sockets.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        self.supervisor.kill(_SHUT_DOWN)
        if self._hub is not None:
            self._hub.remove_reader(self.supervisor.sockets.fileno())
        self.supervisor.sockets.close()
        self.health.close()
        for thread in (self._dead, self.cluster, self.supervisor.results):
            if thread is not None:
                thread.close()

    def _resize(self, slots: int) -> None:
        self.limit = max(0, min(slots, self.most_slots))
        self.supervisor.resize(self.desired_replicas)

    def _replicas_for(self, slots: int) -> int:
        return -(-slots // self._slots_per_replica)

    def slots_changed(self) -> None:
        """React to a change in the number of slots or of waiting inputs."""
        if self.gate is not None and self._state == self.RUN:
            self.gate.request()

    def observe(self) -> None:
        """Update scores and health, and publish the worker's record; once a second."""
        self.supervisor.observe()
        worker = self.snapshot()
        self.cluster.observe(worker)
        scores = {service: score.value for service, score in worker.scores.items()}
        if self.bands is not None and self.bands.follow(
            scores, self.cluster.others, time.monotonic()
        ):
            self.slots_changed()
        self.health.beat(worker)


@contextlib.contextmanager
def _surviving() -> Iterator[None]:
    """Log an exception of our code, which would otherwise end the worker's loop."""
    try:
        yield
    except Exception:
        logger.exception("a round of the pool failed, and the worker goes on: report this bug")


def _queues(app: Celery, plan: worker_plan.Plan) -> dict[str, list[str]]:
    """Return the queues of each service; those of plain tasks share one key."""
    queues: dict[str, list[str]] = {key: [] for key in plan.slots}
    for name in plan.queues or app.amqp.queues.consume_from:
        queues[plan.service_queues.get(name, services.PLAIN)].append(name)
    return queues


def _limited(plan: worker_plan.Plan) -> dict[str, dict[str, int]]:
    """Return the queues with a limited queue time, and the services and slots behind each."""
    queues = {service.queue for service in plan.served if service.key in plan.queue_times}
    return {
        queue: {
            service.key: service.max_inputs for service in plan.served if service.queue == queue
        }
        for queue in queues
    }
