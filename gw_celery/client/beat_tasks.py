"""The sweeps: what Celery's beat sends, so that all workers probe and measure when it ticks.

Each is an ordinary Celery task on a queue that every worker with the GPU pool consumes. Whichever
worker runs it tells all others, by a control command that nobody answers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import celery
from celery import _state
from kombu.entity import Exchange, Queue

from gw_celery import conf, errors
from gw_celery.declare import registry

logger = logging.getLogger(__name__)

#: The queue of the sweeps.
QUEUE = "gw.control"
#: What the names of our entries in ``beat_schedule`` begin with.
PREFIX = "gw_celery."
PROBE = f"{PREFIX}probe_sweep"
BENCHMARK = f"{PREFIX}benchmark_sweep"
#: The control command that each of them broadcasts.
COMMANDS = {PROBE: "gw_probe_tick", BENCHMARK: "gw_benchmark_tick"}
#: Shortest time between two ticks, whatever a probe declares.
_SHORTEST = 1.0

Registries = Callable[[], Iterable[registry.Registry]]

_joined: weakref.WeakSet[Any] = weakref.WeakSet()
#: The entries that we gave to each Celery app; others of the same name are the user's.
_given: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def join(celery_app: Any, registries: Registries) -> None:
    """Give a Celery app the sweeps; without one all of this process, as ``shared_task`` does.

    ``registries`` returns the declarations of every App, those that are still to come included.
    """
    if celery_app is not None:
        _join(celery_app, registries)
        return
    for app in list(_state._get_active_apps()):
        if app.finalized:
            _join(app, registries)
    _state.connect_on_app_finalize(lambda app: _join(app, registries))


def _join(app: Any, registries: Registries) -> None:
    if app in _joined:
        return
    _joined.add(app)
    for name, command in COMMANDS.items():
        app.task(
            name=name,
            base=celery.Task,
            bind=True,
            shared=False,
            acks_late=False,
            ignore_result=True,
            store_errors_even_if_ignored=False,
            track_started=False,
        )(_telling(command))
    # What is declared later comes here by ``schedule``.
    app.on_after_finalize.connect(lambda sender, **_: schedule(sender, registries()), weak=False)


def _telling(command: str) -> Callable[[Any], None]:
    def sweep(self: Any) -> None:
        """Tell every worker with the GPU pool that it is time."""
        self.app.control.broadcast(command, reply=False)

    return sweep


def schedule(app: Any, registries: Iterable[registry.Registry]) -> None:
    """Give ``beat_schedule`` of a finalized app an entry for each sweep that somebody needs.

    What the user wrote there stays, an entry of the same name included.
    """
    declared = [one for one in registries if app in one.celery_apps]
    before = _given.get(app, {})
    if not (before or _quickest_probe(declared) or _has_benchmark(declared)):
        return
    try:
        wanted = entries(declared, conf.read(app.conf))
    except errors.ConfigurationError as exc:
        # Raised here, Celery would swallow it; a worker refuses to start with it.
        logger.error("beat_schedule gets no entries of ours: %s", exc)
        return
    users = {
        name: entry
        for name, entry in (app.conf.beat_schedule or {}).items()
        if entry is not before.get(name)
    }
    _given[app] = {name: entry for name, entry in wanted.items() if name not in users}
    conf.assign(app.conf, "beat_schedule", {**users, **_given[app]})


def queue_of(app: Any) -> Any:
    """Return the queue of the sweeps, the same in every process that declares it.

    RabbitMQ refuses a queue that another process declared otherwise, so that no priorities or queue
    types that an app gives to its missing queues are for this one. A project may name it, though.

    Raises:
        KeyError: where a project makes no queues that it has not named.
    """
    named = {getattr(one, "name", one) for one in app.conf.task_queues or ()}
    if QUEUE not in named and app.conf.task_create_missing_queues:
        queue: Any = Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)
        app.amqp.queues[QUEUE] = queue
        queue.queue_arguments = None  # it has just been given the app's
    return app.amqp.queues[QUEUE]


def given(app: Any) -> dict[str, Any]:
    """Return the entries in ``beat_schedule`` that are ours."""
    return dict(_given.get(app, {}))


def entries(
    declared: Iterable[registry.Registry], settings: conf.Settings
) -> dict[str, dict[str, Any]]:
    """Return the entries that these declarations need."""
    declared = list(declared)
    found = {}
    if (longest := settings.probe_period) and (quickest := _quickest_probe(declared)):
        found[PROBE] = _entry(PROBE, max(_SHORTEST, min(longest, quickest)))
    if settings.benchmark_period and _has_benchmark(declared):
        found[BENCHMARK] = _entry(BENCHMARK, settings.benchmark_period)
    return found


def _entry(name: str, period: float) -> dict[str, Any]:
    options = {
        "queue": QUEUE,
        "expires": period,
        # RabbitMQ then drops what nobody takes.
        "expiration": period,
        "ignore_result": True,
    }
    return {"task": name, "schedule": period, "options": options}


def _quickest_probe(declared: Iterable[registry.Registry]) -> float | None:
    """The shortest period of all probes; ``None`` without any."""
    services = (one for declarations in declared for one in declarations.services.values())
    return min((probe.period_s for one in services for probe in one.probes), default=None)


def _has_benchmark(declared: Iterable[registry.Registry]) -> bool:
    return any(
        method.benchmark is not None
        for declarations in declared
        for service in declarations.services.values()
        for method in service.methods.values()
    )
