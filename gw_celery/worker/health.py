"""What a platform's own probes ask of a worker: is it alive, has it started, is it ready.

A file whose age tells that the worker's loop turns, and ``/livez /readyz /startupz`` over HTTP.
Both are answered from the picture that the loop leaves here once a second, by threads that ask
nothing of anybody: no broker, no child, and no Django.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gw_celery import conf, errors
from gw_celery.declare import services
from gw_celery.protocol import snapshot
from gw_celery.worker import http

logger = logging.getLogger(__name__)

_INTERVAL = 1.0
#: The file is touched while the loop was heard of in so many seconds.
_FRESH = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """An answer, and why."""

    is_ok: bool
    why: tuple[str, ...] = ()


def is_ready(picture: snapshot.Worker) -> Verdict:
    """Whether some replica takes inputs of each service that the worker serves.

    One that should have no replicas is ready: it starts one as soon as there is work.
    """
    if picture.is_stopping:
        return Verdict(is_ok=False, why=("the worker stops",))
    if picture.desired == 0:
        return Verdict(is_ok=True, why=("no replica is wanted now",))
    named = [one for one in picture.ready_slots if one != services.PLAIN] or [services.PLAIN]
    missing = [one for one in named if not picture.ready_slots.get(one)]
    why = [f"no replica is ready for {one or 'plain tasks'}" for one in missing]
    return Verdict(is_ok=not missing, why=(*why, *([picture.outage] if picture.outage else [])))


def why_not(one: snapshot.Replica) -> str:
    """Say in a line what keeps a replica from inputs; "" for one that is ready for all."""
    said = [f"{probe.kind} probe {probe.name}: {probe.detail}" for probe in failing(one)]
    if one.last_error and one.state != "ready":
        said.append(one.last_error)
    if one.state == "ready" and not said:
        return ""
    return "; ".join([f"{one.state} for {one.seconds_in_state:.0f} s", *said])


def failing(one: snapshot.Replica) -> list[snapshot.Probe]:
    return [probe for probe in one.probes if probe.is_ok is False]


class Health:
    """The signs of life of a worker, and the thread that gives them."""

    def __init__(self, settings: conf.Settings) -> None:
        self._file = settings.heartbeat_file
        self._host, self._port = settings.health_host, settings.health_port
        #: Silence of the loop after which the worker counts as dead.
        self._longest = settings.heartbeat_timeout
        #: What each path answers; others may be added before and after ``start``.
        self.routes: dict[str, http.Route] = {
            "/livez": lambda: self._reply(self.is_alive()),
            "/readyz": lambda: self._reply(is_ready(self._picture)),
            "/startupz": lambda: self._reply(self.has_started()),
        }
        #: Called with each beat, in the thread of the loop.
        self.watchers: list[Callable[[], None]] = []
        self._picture = snapshot.Worker(hostname="", desired=1)
        self._has_started = False
        self._beat_at = time.monotonic()
        #: Since when the loop waits for the broker, and cannot turn.
        self._connecting_since: float | None = None
        self._endpoint: http.Endpoint | None = None
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        self._is_touching = True

    @property
    def address(self) -> str:
        """Where it answers; "" where it does not."""
        return "" if self._endpoint is None else self._endpoint.address

    def start(self) -> None:
        """Give signs of life from now on, where any are configured.

        Raises:
            ConfigurationError: for a file that cannot be written, or a port that is taken.
        """
        self.beat(self._picture)
        if self._port is not None:
            self._endpoint = http.Endpoint(self._host, self._port, self.routes)
            self._endpoint.start()
            logger.info("the worker's health is at %s/livez /readyz /startupz", self.address)
        if self._file is not None:
            self._require_file(self._file)
            self._thread = threading.Thread(target=self._run, name="gw-health", daemon=True)
            self._thread.start()

    def beat(self, picture: snapshot.Worker) -> None:
        """The loop turns, and sees this; from its thread."""
        self._picture = picture
        self._has_started |= picture.desired == 0 or any(map(_is_up, picture.replicas))
        self._beat_at = time.monotonic()
        for watch in self.watchers:
            watch()

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """The loop waits for the broker in this block: that is no fault of the worker."""
        self._connecting_since = time.monotonic()
        try:
            yield
        finally:
            self._beat_at = time.monotonic()
            self._connecting_since = None

    def close(self) -> None:
        """The worker stops as it should: no sign of life is left."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(2 * _INTERVAL)
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file)

    def is_alive(self) -> Verdict:
        """Whether the loop turns, or waits for the broker."""
        since, now = self._connecting_since, time.monotonic()
        if since is not None:
            return Verdict(is_ok=True, why=(f"connects to the broker for {now - since:.0f} s",))
        silence = now - self._beat_at
        if silence <= self._longest:
            return Verdict(is_ok=True)
        return Verdict(is_ok=False, why=(f"the worker's loop has not turned for {silence:.0f} s",))

    def has_started(self) -> Verdict:
        """Whether a replica has been ready since the worker's start."""
        why = () if self._has_started else ("no replica has been ready yet",)
        return Verdict(is_ok=self._has_started, why=why)

    def _run(self) -> None:
        while not self._is_over.wait(_INTERVAL):
            self._touch_if_alive()

    def _touch_if_alive(self) -> None:
        silence = time.monotonic() - self._beat_at
        if self._file is None or (self._connecting_since is None and silence > _FRESH):
            return
        try:
            _touch(self._file)
        except OSError as exc:
            if self._is_touching:  # once, and not every second
                logger.error("gw_heartbeat_file=%r cannot be touched: %s", self._file, exc)
            self._is_touching = False
        else:
            self._is_touching = True

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
        said: dict[str, Any] = {
            "ok": verdict.is_ok,
            "why": verdict.why,
            "replicas": [
                {"number": one.number, "state": one.state, "pid": one.pid, "why": why_not(one)}
                for one in self._picture.replicas
            ],
        }
        return http.Reply(status=200 if verdict.is_ok else 503, body=json.dumps(said).encode())


def _is_up(one: snapshot.Replica) -> bool:
    return one.state in ("ready", "unready")


def _touch(path: str) -> None:
    with open(path, "ab"):
        os.utime(path)
