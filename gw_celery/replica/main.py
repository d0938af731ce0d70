"""The main part of a child: loads the app, then follows its parent's orders on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import multiprocessing
import os
import pickle
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
from celery import _state, platforms, signals
from celery.app import trace
from celery.app.utils import find_app
from celery.worker import state as worker_state
from kombu import exceptions, pools

from gw_celery import conf, errors
from gw_celery import signals as gw_celery_signals
from gw_celery.client import execution, preset
from gw_celery.declare import registry
from gw_celery.protocol import frames
from gw_celery.replica import benchmark, probe, result_backends, tracer
from gw_celery.runtime import (
    batcher,
    django_connections,
    greenlet_bridge,
    in_process,
    lifecycle,
    log_records,
    loop,
)

logger = logging.getLogger(__name__)

#: Seconds between two heartbeats.
_BEAT = 1.0
#: Consecutive checks without free file descriptors that make a child unfit.
_FAILURES = 3
#: Pairs of file descriptors that an input may need.
_SPARE = 4
#: Seconds that the end of a child waits for the broker to accept the last messages.
CLOSE_TIMEOUT = 2.0


def run(channel: socket.socket, setup: dict[str, Any]) -> int:
    """Load and enter everything, then run inputs until the end; return the exit code."""
    link = ParentLink()
    try:
        app = load(setup, link)
    except BaseException as exc:
        channel.sendall(frames.pack_reports([_failure(exc)]))
        return 1
    channel.sendall(frames.pack_reports([(frames.Report.LOADED,)]))
    running = asyncio.new_event_loop()
    asyncio.set_event_loop(running)
    return running.run_until_complete(_serve(channel, link, app, setup))


def load(setup: dict[str, Any], link: ParentLink) -> Any:
    """Import the app, and set this process up as Celery's own pools do with theirs."""
    hostname = setup["hostname"]
    log_records.install()
    _state._set_task_join_will_block(True)
    multiprocessing.current_process().name = f"replica-{setup['number']}"
    app = find_app(setup["app"])
    app.conf.update(pickle.loads(setup["changes"]))  # noqa: S301 - from the parent
    app.set_current()
    app.set_default()
    settings = conf.read(app.conf)
    preset.configure_codec(settings)
    around = django_connections.around(app)
    app.loader.init_worker()  # sets up Django
    app.loader.init_worker_process()
    result_backends.install(app, around, settings.store_timeout, link)
    # As in Celery's prefork children: the environment has the parent's choices.
    environment = conf.environment()
    app.log.setup(
        int(environment.get("CELERY_LOG_LEVEL") or 0),
        environment.get("CELERY_LOG_FILE") or None,
        bool(environment.get("CELERY_LOG_REDIRECT")),
        str(environment.get("CELERY_LOG_REDIRECT_LEVEL")),
        hostname=hostname,
    )
    platforms.set_mp_process_title("gw_celery", hostname=hostname)
    trace.setup_worker_optimizations(app, hostname)
    app.amqp = greenlet_bridge.publishing(type(app.amqp), around)(app=app)
    tracer.prepare(app, hostname)
    worker_state.reset_state()
    return app


class ParentLink(asyncio.Protocol):
    """The child's end of the socket: receives orders and sends reports."""

    def __init__(self) -> None:
        self.leaving = asyncio.Event()
        #: The function that carries out each order.
        self.orders: dict[int, Callable[..., None]] = {frames.Order.LEAVE: self.leaving.set}
        self._unpacker = frames.Unpacker(frames.MAX_PARENT_FRAME_BYTES)
        self._transport: Any = None
        self._outbox: list[tuple[Any, ...]] = []
        self._beat_at = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for payload in self._unpacker.feed(data):
            for order, *content in frames.unpack_orders(payload):
                self.orders[order](*content)
        # Report starts at once, because a body may block the loop from its first line.
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the parent is gone, and nothing receives answers

    def report(self, kind: frames.Report, *content: Any) -> None:
        """Send a report, together with the others of this turn of the loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self.flush)
        self._outbox.append((kind, *content))

    def flush(self) -> None:
        """Send the reports of this turn of the loop now."""
        reports, self._outbox = self._outbox, []
        if reports:
            self._transport.write(frames.pack_reports(reports))

    def beat(self) -> None:
        """Send a heartbeat now, and repeatedly from now on."""
        now = time.monotonic()
        lag = max(0.0, now - (self._beat_at or now))
        self._beat_at = now + _BEAT
        resident_bytes = 0
        with contextlib.suppress(psutil.Error, OSError):
            resident_bytes = int(psutil.Process().memory_info().rss)
        self.report(frames.Report.BEAT, lag, resident_bytes)
        asyncio.get_running_loop().call_later(_BEAT, self.beat)

    def check_files(self, failures: int = 0) -> None:
        """Report that this process cannot open files any more; check repeatedly from now on."""
        failures = 0 if _can_open_files() else failures + 1
        if failures == _FAILURES:
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            reason = (
                f"its inputs have used up its {most} file descriptors: close what they open, or "
                f"raise the limit (ulimit -n)"
            )
            self.report(frames.Report.UNFIT, reason)
        wait = _BEAT / _FAILURES if failures else _BEAT
        asyncio.get_running_loop().call_later(wait, self.check_files, failures)


def _can_open_files() -> bool:
    """Return whether an input could open a connection and a few files."""
    try:
        with contextlib.ExitStack() as opened:
            for _ in range(_SPARE):
                for end in socket.socketpair():
                    opened.enter_context(end)
    except OSError as exc:
        return exc.errno != errno.EMFILE  # a limit of the whole system is not this child's fault
    return True


async def _serve(channel: socket.socket, link: ParentLink, app: Any, setup: dict[str, Any]) -> int:
    running = asyncio.get_running_loop()
    await running.create_connection(lambda: link, sock=channel)
    try:
        services = Services(link, app, setup)
        has_entered = await services.enter()
    except BaseException as exc:
        link.report(*_failure(exc))
        link.flush()
        return 1
    if has_entered:
        link.report(frames.Report.ENTERED)
        link.beat()
        link.check_files()
        inputs = tracer.in_flight
        loop.Watchdog(
            loop.Host(running),
            lambda: [f"{input.name}[{input.task_id}]" for input in list(inputs.values())],
        ).start()
        await link.leaving.wait()
        await services.leave()
    return 0


class Services:
    """The services of this child, and the handlers of its orders; created on its loop.

    Args:
        link: the connection to the parent.
        app: the Celery app.
        setup: the parent's first frame.
    """

    def __init__(self, link: ParentLink, app: Any, setup: dict[str, Any]) -> None:
        self._link = link
        self._hostname: str = setup["hostname"]
        self._registries = gw_celery_signals.registries()
        self._served = list(registry.serving(self._registries, setup["queues"]))
        settings, around = conf.read(app.conf), django_connections.around(app)
        batchers = batcher.Batchers(
            around=around,
            tell=link.flush,
            on_stuck=lambda name: link.report(frames.Report.STUCK, name),
            grace=settings.cancel_timeout,
        )
        self._runtime = in_process.LocalRuntime(
            settings,
            enforces_limits=False,
            host=loop.Host(asyncio.get_running_loop()),
            batchers=batchers,
        )
        threads = sum(service.max_inputs for service in self._served) + 1  # one for plain tasks
        worker, records = setup["worker"], None
        if worker is not None and hasattr(app.backend, "command"):
            records = result_backends.EarlyAckRecords(app, worker)
        inputs = tracer.ReplicaInputs(app, link, threads, around, records)
        self._benchmarks = benchmark.Benchmarks(app, inputs, link)
        self._probes = probe.Probes(self._runtime, self._served, link, around)
        link.orders |= {
            frames.Order.RUN: inputs.start,
            frames.Order.RUN_ALONE: functools.partial(inputs.start, runs_alone=True),
            frames.Order.SOFT: inputs.limit,
            frames.Order.STOP: inputs.stop,
            frames.Order.DROP: inputs.drop,
            frames.Order.DRAIN: batchers.drain,
            frames.Order.BENCHMARK: self._benchmarks.start,
            frames.Order.PROBE: self._probes.start,
        }

    async def enter(self) -> bool:
        """Enter contexts and hooks; return ``True`` when all have entered.

        If the parent orders the child to leave meanwhile, exit what has entered, and return
        ``False``.
        """
        entering = asyncio.create_task(self._enter())
        leaving = asyncio.create_task(self._link.leaving.wait())
        await asyncio.wait([entering, leaving], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if entering.done():
            entering.result()
            return True
        entering.cancel()
        await asyncio.wait([entering])
        return False

    async def _enter(self) -> None:
        self._runtime.start()
        execution.install(self._runtime)
        await self._runtime.grow(self._registries, self._served)
        # Celery logs exceptions of the user's receivers and continues; here they end the start.
        causes: dict[str, BaseException] = {
            getattr(receiver, "__qualname__", repr(receiver)): outcome
            for receiver, outcome in signals.worker_process_init.send(sender=self._hostname)
            if isinstance(outcome, Exception)
        }
        if causes:
            raise errors.StartupError(causes)
        logger.info("pid %d has loaded %d services", os.getpid(), len(self._served))

    async def leave(self) -> None:
        """Exit contexts and hooks, after ending running benchmarks and probes."""
        await self._benchmarks.stop()
        self._probes.close()
        execution.install(None)
        await self._runtime.leave()
        signals.worker_process_shutdown.send(sender=self._hostname, pid=os.getpid(), exitcode=0)
        await close_connections(CLOSE_TIMEOUT)


async def close_connections(timeout: float) -> None:
    """Close the connections that tasks and results used, within ``timeout`` seconds.

    RabbitMQ may lose the last messages of a connection that is cut. A close waits for its answer,
    which follows after everything was accepted. A pool's ``force_close_all`` only cuts.
    """

    def close() -> None:
        for pool in list(pools.connections.values()):
            connections: list[Any] = []
            with contextlib.suppress(exceptions.LimitExceeded):
                connections.extend(pool.acquire(block=False) for _ in range(pool.limit or 0))
            for connection in connections:
                if connection.connected:
                    connection.close()
                connection.release()

    try:
        async with asyncio.timeout(timeout):
            await asyncio.to_thread(close)
    except TimeoutError:
        logger.warning(
            "pid %d: the broker did not answer the end of a connection in %.0f s",
            *(os.getpid(), timeout),
        )
    except Exception as exc:
        logger.warning(
            "pid %d: a connection to the broker could not be closed: %r", os.getpid(), exc
        )


def _failure(exc: BaseException) -> tuple[frames.Report, str]:
    """Log why this child cannot serve, and return the report for the parent."""
    lifecycle.log_causes(exc)
    if not isinstance(exc, errors.StartupError):
        logger.error("pid %d: %s failed to load", os.getpid(), "the app", exc_info=exc)
    return frames.Report.FAILED, errors.titled(exc)
