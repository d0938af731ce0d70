"""The main part of a child: it loads the app, then serves its parent's orders on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
from celery import _state, platforms, signals
from celery.app import trace
from celery.app.utils import find_app
from celery.worker import state as worker_state

from gw_celery import conf, errors
from gw_celery import signals as gw_celery_signals
from gw_celery.client import execution, preset
from gw_celery.declare import registry
from gw_celery.protocol import frames
from gw_celery.replica import (
    connections,
    early_ack_records,
    probe,
    result_backends,
    scoring,
    tracer,
)
from gw_celery.replica import input as replica_input
from gw_celery.runtime import (
    batcher,
    django_connections,
    fatal_exit,
    in_process,
    loop,
    offload,
    watchdog,
)

logger = logging.getLogger(__name__)

#: Seconds between two signs of life.
_BEAT = 1.0
#: Seconds that the end of a child waits for the broker to take what was published last.
_FAREWELL = 2.0
#: Characters of the reason that the parent hears; the log has all of it.
_LONGEST_REASON = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading the app gave this child."""

    app: Any
    settings: conf.Settings
    #: Calls what it is given, with whatever must surround work in a thread.
    around: Callable[..., Any]
    outages: Outages


class Outages:
    """Passes on that the result backend is away, or back, once there is a child to tell it."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None

    def __call__(self, reason: str) -> None:
        if self.listener is not None:
            self.listener(reason)


def run(channel: socket.socket, setup: dict[str, Any]) -> int:
    """Load, report that all is entered, run inputs until told to leave; returns the exit code."""
    try:
        loaded = load(setup)
    except BaseException as exc:
        channel.sendall(frames.pack_reports([_failure(exc)]))
        return 1
    channel.sendall(frames.pack_reports([(frames.Report.LOADED,)]))
    running = asyncio.new_event_loop()
    asyncio.set_event_loop(running)
    return running.run_until_complete(_serve(channel, loaded, setup))


def load(setup: dict[str, Any]) -> Loaded:
    """Import the app and make this process one of its worker's, as Celery's own pools do."""
    hostname = setup["hostname"]
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
    outages = Outages()
    result_backends.install(app, around, settings.store_timeout, outages)
    _set_up_logging(app, hostname)
    platforms.set_mp_process_title("gw_celery", hostname=hostname)
    trace.setup_worker_optimizations(app, hostname)
    app.amqp = offload.publishing(type(app.amqp), around)(app=app)
    tracer.prepare(app, hostname)
    worker_state.reset_state()
    return Loaded(app=app, settings=settings, around=around, outages=outages)


async def _serve(channel: socket.socket, loaded: Loaded, setup: dict[str, Any]) -> int:
    running = asyncio.get_running_loop()
    _, child = await running.create_connection(lambda: Child(loaded, setup), sock=channel)
    return await child.live()


class Child(asyncio.Protocol):
    """The child's end of the socket."""

    def __init__(self, loaded: Loaded, setup: dict[str, Any]) -> None:
        self._loaded = loaded
        loaded.outages.listener = lambda reason: self.report((frames.Report.OUTAGE, reason))
        self._setup = setup
        self._unpacker = frames.Unpacker(frames.MAX_PARENT_FRAME_BYTES)
        self._transport: Any = None
        self._outbox: list[tuple[Any, ...]] = []
        self._leaving = asyncio.Event()
        self._batchers = batcher.Batchers(
            batcher.Host(
                around=loaded.around,
                tell=self._flush,
                on_stuck=lambda name: self.report((frames.Report.STUCK, name)),
                grace=loaded.settings.cancel_timeout,
            )
        )
        self._orders: dict[int, Callable[..., None]] = {
            frames.Order.LEAVE: self._leaving.set,
            frames.Order.DRAIN: self._batchers.drain,
        }
        self._scoring: scoring.Scoring
        self._probes: probe.Probes | None = None
        self._beat_at = 0.0

    # -- protocol --

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for payload in self._unpacker.feed(data):
            for order, *rest in frames.unpack_orders(payload):
                self._orders[order](*rest)
        # What starts is told before it starts: a body may block the loop from its first line.
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the parent is gone; whatever runs here nobody will hear of

    def report(self, one: tuple[Any, ...]) -> None:
        """Send a report, together with the others of this turn of the loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(one)

    def _flush(self) -> None:
        reports, self._outbox = self._outbox, []
        if reports:
            self._transport.write(frames.pack_reports(reports))

    # -- life --

    async def live(self) -> int:
        try:
            runtime = await self._enter_unless_told_to_leave()
        except BaseException as exc:
            self._transport.write(frames.pack_reports([_failure(exc)]))
            return 1
        if runtime is None:
            return 0
        self.report((frames.Report.ENTERED,))
        self._beat_at = time.monotonic()
        self._beat()
        watchdog.Watchdog(loop.MainLoop(asyncio.get_running_loop()), _in_flight).start()
        await self._leaving.wait()
        await self._scoring.stop()
        if self._probes is not None:
            self._probes.close()
        execution.install(None)
        await runtime.leave()
        signals.worker_process_shutdown.send(
            sender=self._setup["hostname"], pid=os.getpid(), exitcode=0
        )
        await connections.close_all(_FAREWELL)
        return 0

    async def _enter_unless_told_to_leave(self) -> in_process.Process | None:
        """A worker that stops does not wait for a load; what has entered by then is left."""
        entering = asyncio.create_task(self._enter())
        leaving = asyncio.create_task(self._leaving.wait())
        await asyncio.wait([entering, leaving], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if entering.done():
            return entering.result()
        entering.cancel()
        await asyncio.wait([entering])
        return None

    async def _enter(self) -> in_process.Process:
        """Enter the contexts and hooks of what this replica serves."""
        known = gw_celery_signals.registries()
        served = list(registry.serving(known, self._setup["queues"]))
        runtime = in_process.Process(
            self._loaded.settings,
            enforces_limits=False,
            host=loop.MainLoop(asyncio.get_running_loop()),
            batchers=self._batchers,
        )
        runtime.start()
        execution.install(runtime)
        threads = sum(one.max_inputs for one in served) + 1  # one for plain tasks
        app, around = self._loaded.app, self._loaded.around
        early = early_ack_records.of(app, self._setup["worker"])
        inputs = tracer.Inputs(app, self.report, threads, around, early)
        self._scoring = scoring.Scoring(app, self._loaded.settings, inputs.called, self.report)
        self._probes = probe.Probes(runtime, served, self.report, around)
        self._orders |= {
            frames.Order.RUN: inputs.run,
            frames.Order.RUN_ALONE: inputs.run_alone,
            frames.Order.SOFT: inputs.limit,
            frames.Order.STOP: inputs.stop,
            frames.Order.BENCHMARK: self._scoring.order,
            frames.Order.PROBE: self._probes.call,
        }
        await runtime.grow(known, served)
        _send_process_init(self._setup["hostname"])
        logger.info("pid %d has loaded %d services", os.getpid(), len(served))
        return runtime

    def _beat(self) -> None:
        now = time.monotonic()
        lag = max(0.0, now - self._beat_at)
        self._beat_at = now + _BEAT
        self.report((frames.Report.BEAT, lag, _resident_bytes()))
        asyncio.get_running_loop().call_later(_BEAT, self._beat)


def _in_flight() -> list[str]:
    return [f"{one.name}[{one.task_id}]" for one in list(replica_input.held.values())]


def _send_process_init(hostname: str) -> None:
    """Tell the user's receivers; Celery logs what they raise and goes on, this does not.

    Raises:
        StartupError: naming each receiver that raised.
    """
    outcomes = signals.worker_process_init.send(sender=hostname)
    causes: dict[str, BaseException] = {
        getattr(receiver, "__qualname__", repr(receiver)): outcome
        for receiver, outcome in outcomes
        if isinstance(outcome, Exception)
    }
    if causes:
        raise errors.StartupError(causes)


def _set_up_logging(app: Any, hostname: str) -> None:
    """As Celery does in the children of prefork: what the parent chose is in the environment."""
    given = conf.environment()
    app.log.setup(
        int(given.get("CELERY_LOG_LEVEL") or 0),
        given.get("CELERY_LOG_FILE") or None,
        bool(given.get("CELERY_LOG_REDIRECT")),
        str(given.get("CELERY_LOG_REDIRECT_LEVEL")),
        hostname=hostname,
    )


def _failure(exc: BaseException) -> tuple[Any, ...]:
    """Log why this child cannot serve, and return the report that says it to the parent."""
    fatal_exit.log_causes(exc)
    if not isinstance(exc, errors.StartupError):
        logger.error("the app failed to load", exc_info=exc)
    return (frames.Report.FAILED, f"{type(exc).__name__}: {exc}"[:_LONGEST_REASON])


def _resident_bytes() -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process().memory_info().rss)
    return 0
