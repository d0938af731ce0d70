"""The settings: one frozen dataclass of typed defaults, and the only reader of them.

Priority: what the caller passes > ``app.conf.gw_<name>`` (Django's ``GW_CELERY`` lands there) >
the default below. Environment variables name programs and devices only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from gw_celery import errors

PREFIX = "gw_"


#: Numbers that may not be anything over 0: the least and the most, and how that is said. Workers
#: beat once a second, so that one is not lost within five.
_BOUNDS = {
    "health_port": (0, 65_535, "int from 0 to 65535"),
    "target_util": (math.ulp(0.0), 1, "float over 0, 1 at most"),
    "worker_ttl": (5, math.inf, "float, 5 at least"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting with its default. Durations are seconds, sizes are bytes."""

    #: Kinds of GPU that ``gw.Gpu`` accepts beside the built-in ones.
    gpu_kinds: tuple[str, ...] = ()
    #: Time that contexts and ``on_enter`` hooks have until they count as failed.
    start_timeout: float = 600.0
    #: Time that a child of the pool has to import the app.
    boot_timeout: float = 30.0
    #: Time that the benchmarks of a child have, all of them together.
    benchmark_timeout: float = 120.0
    #: Time that a draining replica has, unless an input in flight may run for longer.
    drain_timeout: float = 30.0
    #: Silence after which a child of the pool counts as frozen.
    heartbeat_timeout: float = 30.0
    #: File that a worker with the GPU pool touches every second while its loop turns.
    heartbeat_file: str | None = None
    #: Port of ``/livez``, ``/readyz``, ``/startupz`` and ``/metrics``; 0 for any that is free.
    health_port: int | None = None
    #: Address that it is open on.
    health_host: str = "127.0.0.1"
    #: Time that a stopping worker waits for its inputs in flight.
    shutdown_timeout: float = 3600.0
    #: Time that a result is tried to be stored while the result backend is away.
    store_timeout: float = 60.0
    #: Children that an input may kill, running alone, until it is given up.
    max_deaths: int = 3
    #: Queue that keeps the messages of inputs that were given up; ``None`` for none.
    dead_letter_queue: str | None = "gw.dead"
    #: Messages that it keeps at most.
    max_dead_letters: int = 1000
    #: Time without a sign of life after which a worker with the GPU pool is declared lost, 5 at
    #: least; ``None``: never.
    worker_ttl: float | None = 15.0
    #: Replicas of a worker with the GPU pool; without it, as many as its slots need.
    replicas: int | None = None
    #: Workload a second of each service that the autoscaler is ready for, whatever comes.
    min_load: float | None = None
    #: Part of its score that a replica is meant to be used by, 1 at most.
    target_util: float = 0.9
    #: Time within which what waits for a service should have been begun.
    target_queue_time: float = 10.0
    #: Time for which the autoscaler keeps replicas for bursts that may come again.
    scale_window: float = 600.0
    #: Time without work after which the last replica goes, where none must stay; ``None``: never.
    inactivity_timeout: float | None = None
    #: Longest time between two ticks of beat to the probes, shorter where a probe's period is;
    #: whole seconds; ``None`` for no entry in ``beat_schedule``.
    probe_period: float | None = 10.0
    #: Age at which a score is measured again, on a replica that has nothing to do, and the time
    #: between two ticks of beat to the benchmarks; ``None``: never.
    benchmark_period: float | None = 86_400.0
    #: Time that each context or ``on_exit`` hook has to leave.
    exit_timeout: float = 30.0
    #: Time that a cancelled body has to end before its process goes on without it.
    cancel_timeout: float = 5.0
    #: Longest wait of a blocking ``.remote()`` that names no timeout.
    call_timeout: float = 600.0
    #: Time that an input may wait in its queue, where its service does not say; ``None``: for ever.
    max_queue_time: float | None = None
    #: Loaded instances of one class, of different parameters, that a process keeps.
    max_instances: int = 3
    #: Threads that publish calls for event loops.
    publish_threads: int = 4
    #: Calls of one process that may wait for an answer at a time.
    max_waiting: int = 100_000
    #: Interval at which a result backend without notifications is asked.
    poll_interval: float = 0.5
    #: Largest gw-json document, written or read, and body of a message, decompressed.
    max_payload_bytes: int = 64 * 1024 * 1024
    #: Deepest nesting of a gw-json document.
    max_payload_depth: int = 100


def read(conf: Mapping[str, Any]) -> Settings:
    """Return the settings in ``conf``, a Celery configuration: its keys that begin with ``gw_``.

    A project that keeps Celery's settings in a namespace writes ``CELERY_GW_START_TIMEOUT``.

    Raises:
        ConfigurationError: for an unknown key, with the nearest known one, or a wrong type.
    """
    checked = _checked(_beginning_with(PREFIX, conf), "app.conf.", PREFIX)
    if namespace := getattr(conf, "prefix", None):
        begin = f"{namespace}{PREFIX}".upper()
        checked |= _checked(_beginning_with(begin, conf), "", begin)
    return Settings(**checked)


def is_set(conf: Any, name: str) -> bool:
    """Whether the user set ``name`` in a Celery configuration that has been read.

    Celery's own ``without_defaults`` forgets the namespace that a project keeps its settings in.
    """
    return any(key in layer for layer in conf.maps[:-1] for key in conf._to_keys(name))


def assign(conf: Any, name: str, value: Any) -> None:
    """Set ``name`` in a Celery configuration, over what the project has in its namespace.

    Celery 5.6 would go on to read that.
    """
    conf[conf._to_keys(name)[0]] = value


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Return settings from the bare names that Django's ``GW_CELERY`` has.

    Raises:
        ConfigurationError: for an unknown key, with the nearest known one, or a wrong type.
    """
    return Settings(**_checked(values, "GW_CELERY ", ""))


def is_django_project() -> bool:
    """Whether this process belongs to a Django project, as Celery's own fixup decides it."""
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, for a child of it."""
    return dict(os.environ)


@contextlib.contextmanager
def talking_to(broker_url: str, result_url: str) -> Iterator[None]:
    """Let the Celery apps of this process use these servers, whatever their own configuration."""
    urls = {"CELERY_BROKER_URL": broker_url, "CELERY_RESULT_BACKEND": result_url}
    before = {name: os.environ[name] for name in urls if name in os.environ}
    os.environ.update(urls)
    try:
        yield
    finally:
        for name in urls:
            os.environ.pop(name, None)
        os.environ.update(before)


def server_program() -> str | None:
    """Return the server program that ``GW_CELERY_SERVER`` names, if any."""
    return os.environ.get("GW_CELERY_SERVER") or None


def fake_gpus() -> str | None:
    """Return the devices that ``GW_FAKE_GPUS`` names in place of those of the machine, if any."""
    return os.environ.get("GW_FAKE_GPUS") or None


def visible_devices() -> str | None:
    """Return ``CUDA_VISIBLE_DEVICES`` of this process; ``""`` hides all, ``None`` none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _beginning_with(prefix: str, conf: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): conf[key] for key in conf if key.startswith(prefix)}


def _checked(given: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    """Return the values of known settings by their names; ``prefix`` is how they begin there."""
    hints = typing.get_type_hints(Settings)
    known = {(name.upper() if prefix.isupper() else name): name for name in hints}
    checked: dict[str, Any] = {}
    for written, value in given.items():
        if written not in known:
            # In the form in which it must be written there.
            spelt = written.upper() if prefix.isupper() else written.lower()
            listed = ", ".join(f"{prefix}{name}" for name in known)
            hint = errors.near_miss(spelt, known, f"'{prefix}{{}}'") or f"known: {listed}"
            raise errors.ConfigurationError(f"unknown setting {where}{prefix}{written}; {hint}")
        name = known[written]
        label = f"{where}{prefix}{written}={value!r}"
        checked[name] = _typed(label, value, hints[name], _BOUNDS.get(name))
    return checked


def _typed(label: str, value: Any, expected: Any, bounds: tuple[float, float, str] | None) -> Any:
    is_optional = isinstance(expected, types.UnionType)
    kind = typing.get_args(expected)[0] if is_optional else expected
    if value is None and is_optional:
        return None
    if kind in (int, float):
        least, most, allowed = bounds or (math.ulp(0.0), math.inf, f"{kind.__name__} over 0")
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if is_number and least <= value <= most and math.isfinite(value):
            return kind(value)
    elif kind is str:
        allowed = "str"
        if isinstance(value, str):
            return value
    else:
        allowed = "tuple"
        if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return tuple(value)
    allowed += " or None" if is_optional else ""
    raise errors.ConfigurationError(f"setting {label}: must be {allowed}")
