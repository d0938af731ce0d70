"""The settings, a frozen dataclass with defaults. No other module reads them, in any process.

Priority: an argument of the call > ``app.conf.gw_<name>`` (which Django's ``GW_CELERY`` fills) >
the default below. Environment variables name only programs and devices.
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


#: Minimum, maximum and description of numbers with another range than "over 0". Workers send a
#: heartbeat each second; under 5 seconds, ``worker_ttl`` could declare live workers lost.
_BOUNDS = {
    "health_port": (0, 65_535, "int from 0 to 65535"),
    "target_util": (math.ulp(0.0), 1, "float over 0, 1 at most"),
    "worker_ttl": (5, math.inf, "float, 5 at least"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings with their defaults. Durations are seconds, sizes are bytes."""

    #: Kinds of GPU that ``gw.Gpu`` accepts in addition to the built-in ones.
    gpu_kinds: tuple[str, ...] = ()
    #: Time that contexts and ``on_enter`` hooks may take before they count as failed.
    start_timeout: float = 600.0
    #: Time that a child of the pool may take to import the app.
    boot_timeout: float = 30.0
    #: Time that all benchmarks of a child may take together.
    benchmark_timeout: float = 120.0
    #: Time that a replica may take to drain, or longer if an input in flight has a longer limit.
    drain_timeout: float = 30.0
    #: Time without a heartbeat after which a child of the pool counts as frozen.
    heartbeat_timeout: float = 30.0
    #: File that a worker with the GPU pool touches every second while its event loop runs.
    heartbeat_file: str | None = None
    #: Port of ``/livez``, ``/readyz``, ``/startupz`` and ``/metrics``; 0 selects a free port.
    health_port: int | None = None
    #: Address on which this port listens.
    health_host: str = "127.0.0.1"
    #: Time that a stopping worker waits for its inputs in flight.
    shutdown_timeout: float = 3600.0
    #: Time for which a worker retries to store a result while the result backend is unreachable.
    store_timeout: float = 60.0
    #: Children that an input may kill while it runs alone, before it is given up.
    max_deaths: int = 3
    #: Queue for the messages of inputs that were given up; ``None``: they are not kept.
    dead_letter_queue: str | None = "gw.dead"
    #: Maximum number of messages in that queue.
    max_dead_letters: int = 1000
    #: Time without a heartbeat after which a worker with the GPU pool counts as lost, at least 5.
    worker_ttl: float = 15.0
    #: Replicas of a worker with the GPU pool; ``None``: as many as its slots need.
    replicas: int | None = None
    #: Minimum load, in workload per second, for which the autoscaler keeps replicas of each
    #: service.
    min_load: float | None = None
    #: Share of a replica's score that the autoscaler plans to use, at most 1.
    target_util: float = 0.9
    #: Time within which an input should start; the autoscaler plans for it.
    target_queue_time: float = 10.0
    #: Time for which the autoscaler keeps the replicas of a past burst.
    scale_window: float = 600.0
    #: Time without work after which the last replica goes if it may; ``None``: never.
    inactivity_timeout: float | None = None
    #: Maximum time between two ticks of beat for probes (less if a probe's period is shorter), in
    #: whole seconds; ``None``: no entry in ``beat_schedule``.
    probe_period: float | None = 10.0
    #: Age at which an idle replica measures a score again, and the time between two ticks of beat
    #: for benchmarks; ``None``: never.
    benchmark_period: float | None = 86_400.0
    #: Time that each context or ``on_exit`` hook may take to exit.
    exit_timeout: float = 30.0
    #: Time that a cancelled body may take to end before its process continues without it.
    cancel_timeout: float = 5.0
    #: Maximum wait of a blocking ``.remote()`` without a timeout of its own.
    call_timeout: float = 600.0
    #: Time that an input may wait in its queue if its service sets no limit; ``None``: no limit.
    max_queue_time: float | None = None
    #: Loaded instances of one class, with different parameters, that a process keeps.
    max_instances: int = 3
    #: Threads of a calling process that publish messages.
    publish_threads: int = 4
    #: Maximum number of calls of one process that wait for an answer.
    max_waiting: int = 100_000
    #: Interval between two reads of a result backend that has no notifications.
    poll_interval: float = 0.5
    #: Maximum size of a gw-json document, and of the decompressed body of a message.
    max_payload_bytes: int = 64 * 1024 * 1024
    #: Maximum number of values of a gw-json document, and of a message in JSON.
    max_payload_values: int = 2_000_000
    #: Maximum nesting of a gw-json document.
    max_payload_depth: int = 100
    #: Whether logs, events and ``inspect`` show the arguments and results of tasks.
    show_values: bool = False
    #: Whether TLS connections may leave the certificate of the broker or backend unverified.
    insecure: bool = False


def read(conf: Mapping[str, Any]) -> Settings:
    """Return the settings from the keys of a Celery configuration that begin with ``gw_``.

    A project whose Celery settings have a namespace writes ``CELERY_GW_START_TIMEOUT``.

    Raises:
        ConfigurationError: for an unknown key, with the nearest known one, or an invalid value.
    """
    checked = _checked(_beginning_with(PREFIX, conf), "app.conf.", PREFIX)
    if namespace := getattr(conf, "prefix", None):
        begin = f"{namespace}{PREFIX}".upper()
        checked |= _checked(_beginning_with(begin, conf), "", begin)
    return Settings(**checked)


def is_set(conf: Any, name: str) -> bool:
    """Return whether the user set ``name`` in a Celery configuration that has been read.

    Celery's own ``without_defaults`` ignores the namespace of a project's settings.
    """
    return any(key in layer for layer in conf.maps[:-1] for key in conf._to_keys(name))


def assign(conf: Any, name: str, value: Any) -> None:
    """Set ``name`` in a Celery configuration, also over the project's namespaced key.

    Celery 5.6 would otherwise continue to read that key.
    """
    conf[conf._to_keys(name)[0]] = value


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Return the settings from the keys of Django's ``GW_CELERY``, which have no prefix.

    Raises:
        ConfigurationError: for an unknown key, with the nearest known one, or an invalid value.
    """
    return Settings(**_checked(values, "GW_CELERY ", ""))


def is_django_project() -> bool:
    """Return whether this process belongs to a Django project, by the rule of Celery's fixup."""
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def environment() -> dict[str, str]:
    return dict(os.environ)


@contextlib.contextmanager
def talking_to(broker_url: str, result_url: str) -> Iterator[None]:
    """Make the Celery apps of this process use these servers instead of the configured ones."""
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
    """Return the server program in ``GW_CELERY_SERVER``; ``None`` if it is not set."""
    return os.environ.get("GW_CELERY_SERVER") or None


def fake_gpus() -> str | None:
    """Return the simulated devices in ``GW_FAKE_GPUS``; ``None`` if it is not set."""
    return os.environ.get("GW_FAKE_GPUS") or None


def visible_devices() -> str | None:
    """Return ``CUDA_VISIBLE_DEVICES``; ``""`` hides all devices, ``None`` shows all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _beginning_with(prefix: str, conf: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): conf[key] for key in conf if key.startswith(prefix)}


def _checked(given: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    """Return the checked values by setting name; ``prefix`` precedes the names in ``given``."""
    hints = typing.get_type_hints(Settings)
    known = {(name.upper() if prefix.isupper() else name): name for name in hints}
    checked: dict[str, Any] = {}
    for written, value in given.items():
        if written not in known:
            # In the spelling that the user must write there.
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
    elif kind in (str, bool):
        allowed = kind.__name__
        if isinstance(value, kind):
            return value
    else:
        allowed = "tuple"
        if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return tuple(value)
    allowed += " or None" if is_optional else ""
    raise errors.ConfigurationError(f"setting {label}: must be {allowed}")
