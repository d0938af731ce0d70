"""What a platform's own probes ask of a worker: is it alive, has it started, is it ready.

A file whose age tells that the worker's loop turns, and ``/livez /readyz /startupz /metrics`` over
HTTP. All are answered from the snapshot that the loop leaves here once a second, by threads that
ask nothing of the broker, a child or Django: while the worker hangs, they are what says so.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gw_celery import conf, errors
from gw_celery.background_thread import BackgroundThread
from gw_celery.declare import services
from gw_celery.protocol import snapshot
from gw_celery.worker import http

logger = logging.getLogger(__name__)

#: The file is touched while the loop has turned within so many seconds.
_FRESH = 3.0
#: Named, as Celery names a worker's parts: the first scrape loads it.
_RENDERER = "gw_celery.contrib.prometheus"


class Verdict(NamedTuple):
    """An answer, and why."""

    is_ok: bool
    why: tuple[str, ...] = ()


def is_ready(worker: snapshot.Worker) -> Verdict:
    """Judge whether some replica takes inputs of each service that the worker serves.

    A worker that should have no replicas is ready: it starts one as soon as there is work.
    """
    if worker.is_stopping:
        return Verdict(is_ok=False, why=("the worker stops",))
    if worker.desired == 0:
        return Verdict(is_ok=True, why=("no replica is wanted now",))
    served = [key for key in worker.ready_slots if key != services.PLAIN] or [services.PLAIN]
    missing = [key for key in served if not worker.ready_slots.get(key)]
    why = [f"no replica is ready for {key or 'plain tasks'}" for key in missing]
    return Verdict(is_ok=not missing, why=(*why, *([worker.outage] if worker.outage else [])))


def why_not(replica: snapshot.Replica) -> str:
    """Say in a line what keeps a replica from inputs; "" for one that is ready for all."""
    reasons = [
        f"{probe.kind} probe {probe.name}: {probe.detail}"
        for probe in replica.probes
        if probe.is_ok is False
    ]
    if replica.state == "ready" and not reasons:
        return ""
    if replica.last_error and replica.state != "ready":
        reasons.append(replica.last_error)
    return "; ".join([f"{replica.state} for {replica.seconds_in_state:.0f} s", *reasons])


class Health(BackgroundThread):
    """The signs of life of a worker; its thread touches the file.

    Args:
        settings: those of the worker.
        service_queues: the service of each service queue.
    """

    def __init__(self, settings: conf.Settings, service_queues: Mapping[str, str]) -> None:
        self._file = settings.heartbeat_file
        super().__init__("gw-health", f"gw_heartbeat_file={self._file!r} cannot be touched")
        self._settings = settings
        self._queues = {service: queue for queue, service in service_queues.items()}
        self._seen = snapshot.Worker(hostname="", desired=1)
        self._has_started = False
        self._beat_at = time.monotonic()
        #: Since when the loop waits for the broker, and cannot turn.
        self._connecting_since: float | None = None
        self._endpoint: http.Endpoint | None = None

    @property
    def address(self) -> str:
        """Where it answers; "" where it does not."""
        return "" if self._endpoint is None else self._endpoint.address

    def start(self) -> None:
        """Give signs of life from now on, where any are configured.

        Raises:
            ConfigurationError: for a file that cannot be written, or a port that is taken.
        """
        self.beat(self._seen)
        if self._settings.health_port is not None:
            routes: dict[str, http.Route] = {
                "/livez": lambda: self._reply(self.is_alive()),
                "/readyz": lambda: self._reply(is_ready(self._seen)),
                "/startupz": lambda: self._reply(self.has_started()),
                "/metrics": self._metrics,
            }
            self._endpoint = http.Endpoint(
                self._settings.health_host, self._settings.health_port, routes
            )
            self._endpoint.start()
            logger.info("the worker's health is at %s/livez /readyz /startupz", self.address)
        if self._file is not None:
            self._require_file(self._file)
            super().start()

    def beat(self, worker: snapshot.Worker) -> None:
        """The loop turns, and sees this; from its thread."""
        self._seen = worker
        is_up = any(replica.state in ("ready", "unready") for replica in worker.replicas)
        self._has_started |= is_up or worker.desired == 0
        self._beat_at = time.monotonic()

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """The loop waits for the broker in this block: that is no fault of the worker."""
        self._connecting_since = time.monotonic()
        try:
            yield
        finally:
            self._beat_at = time.monotonic()
            self._connecting_since = None

    def close(self, timeout: float = 2.0) -> bool:
        """The worker stops as it should: no sign of life is left."""
        is_over = super().close(timeout)
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
        return is_over

    def is_alive(self) -> Verdict:
        """Judge whether the loop turns, or waits for the broker."""
        since, now = self._connecting_since, time.monotonic()
        if since is not None:
            return Verdict(is_ok=True, why=(f"connects to the broker for {now - since:.0f} s",))
        silence = now - self._beat_at
        if silence <= self._settings.heartbeat_timeout:
            return Verdict(is_ok=True)
        return Verdict(is_ok=False, why=(f"the worker's loop has not turned for {silence:.0f} s",))

    def has_started(self) -> Verdict:
        """Judge whether a replica has been ready since the worker's start."""
        why = () if self._has_started else ("no replica has been ready yet",)
        return Verdict(is_ok=self._has_started, why=why)

    def run_round(self) -> None:
        silence = time.monotonic() - self._beat_at
        if self._file is not None and (self._connecting_since is not None or silence <= _FRESH):
            _touch(self._file)

    def _require_file(self, path: str) -> None:
        try:
            _touch(path)
        except OSError as exc:
            self.close()
            raise errors.ConfigurationError(
                f"gw_heartbeat_file={path!r}: cannot be written: {exc.strerror}; name a file in a "
                f"directory that exists and that the worker may write to"
            ) from exc

    def _reply(self, verdict: Verdict) -> http.Reply:
        replicas = [
            {
                "number": replica.number,
                "state": replica.state,
                "pid": replica.pid,
                "why": why_not(replica),
            }
            for replica in self._seen.replicas
        ]
        answer = {"ok": verdict.is_ok, "why": verdict.why, "replicas": replicas}
        return http.Reply(status=200 if verdict.is_ok else 503, body=json.dumps(answer).encode())

    def _metrics(self) -> http.Reply:
        """Answer a scrape; its library is loaded by the first."""
        try:
            renderer: Any = importlib.import_module(_RENDERER)
        except errors.ConfigurationError as exc:
            body = f"{exc}\n".encode()
            return http.Reply(status=501, body=body, content_type="text/plain; charset=utf-8")
        page = renderer.Page(lambda: self._seen, self._queues)
        return http.Reply(body=page(), content_type=page.content_type)


def _touch(path: str) -> None:
    with open(path, "ab"):
        os.utime(path)
