"""Health of a worker for a platform's probes, in the worker's parent: a file and HTTP endpoints.

The age of the file shows whether the loop runs. ``/livez /readyz /startupz /metrics`` answer over
HTTP, from the snapshot that the loop stores here once a second. Separate threads answer,
without the broker, children or Django, because they must report a worker that hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import importlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gw_celery import conf, errors
from gw_celery.background_thread import BackgroundThread
from gw_celery.declare import services
from gw_celery.protocol import snapshot

logger = logging.getLogger(__name__)

#: Seconds in which a client must send its request and read the answer.
_PATIENCE = 2.0
#: Clients at a time, each with a thread; the oldest is cut off for one more.
_MOST_CLIENTS = 32
#: Threads at a time: one whose client was cut off takes a moment to end, or hangs in its answer.
_MOST_THREADS = 128

#: Maximum age in seconds of the loop's last turn for which the file is touched.
_FRESH = 3.0
#: A name instead of an import, so that only the first scrape loads the library.
_RENDERER = "gw_celery.contrib.prometheus"


class Verdict(NamedTuple):
    is_ok: bool
    why: tuple[str, ...] = ()


class Reply(NamedTuple):
    body: bytes
    status: int = 200
    content_type: str = "application/json"


def is_ready(worker: snapshot.Worker) -> Verdict:
    """Check whether a replica takes inputs of each service, and no outage pauses the worker.

    A worker that needs no replica now is ready: it starts one when work arrives.
    """
    if worker.is_stopping:
        return Verdict(is_ok=False, why=("the worker stops",))
    outage = [f"results cannot be stored: {worker.outage}"] if worker.outage else []
    if worker.broker_outage:
        outage.append(f"consuming is paused: {worker.broker_outage}")
    if worker.desired == 0:
        return Verdict(is_ok=not outage, why=(*outage, "no replica is wanted now"))
    served = [key for key in worker.ready_slots if key != services.PLAIN] or [services.PLAIN]
    missing = [key for key in served if not worker.ready_slots.get(key)]
    why = [f"no replica is ready for {key or 'plain tasks'}" for key in missing]
    return Verdict(is_ok=not (missing or outage), why=(*why, *outage))


def why_not(replica: snapshot.Replica) -> str:
    """Return why a replica takes no inputs, in one line; "" if it takes all."""
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
    """Answers a platform's probes; its background thread touches the heartbeat file.

    Args:
        settings: the settings of the worker.
        service_queues: service key of each service queue.
    """

    def __init__(self, settings: conf.Settings, service_queues: Mapping[str, str]) -> None:
        self._file = settings.heartbeat_file
        super().__init__("gw-health", f"gw_heartbeat_file={self._file!r} cannot be written")
        self._settings = settings
        self._queues = {service: queue for queue, service in service_queues.items()}
        self._seen = snapshot.Worker(hostname="", desired=1)
        self._has_started = False
        self._beat_at = time.monotonic()
        #: Time at which the loop began to wait for the broker, which stops its turns.
        self._connecting_since: float | None = None
        self._endpoint: _Endpoint | None = None

    def start(self) -> None:
        """Start the configured endpoint and file.

        Raises:
            ConfigurationError: if the file cannot be written, or the port is in use.
        """
        self.beat(self._seen)
        if self._settings.health_port is not None:
            self._endpoint = _Endpoint(
                self._settings.health_host, self._settings.health_port, self._answer
            )
            logger.info(
                "the worker's health is at %s/livez /readyz /startupz", self._endpoint.address
            )
        if self._file is not None:
            try:
                _touch(self._file)
            except OSError as exc:
                self.close()
                raise errors.ConfigurationError(
                    f"gw_heartbeat_file={self._file!r}: cannot be written: {exc.strerror}; name a "
                    f"file in a directory that exists and that the worker may write to"
                ) from exc
            super().start()

    def beat(self, worker: snapshot.Worker) -> None:
        """Record a turn of the loop and its snapshot; on the loop's thread."""
        self._seen = worker
        is_up = any(replica.state in ("ready", "unready") for replica in worker.replicas)
        self._has_started |= is_up or worker.desired == 0
        self._beat_at = time.monotonic()

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Mark that the loop waits for the broker, which is not a fault of the worker."""
        self._connecting_since = time.monotonic()
        try:
            yield
        finally:
            self._beat_at = time.monotonic()
            self._connecting_since = None

    def close(self, timeout: float = 2.0) -> bool:
        """Close the endpoint and remove the file, because the worker stops regularly."""
        is_over = super().close(timeout)
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
        return is_over

    def run_round(self) -> None:
        silence = time.monotonic() - self._beat_at
        if self._file is not None and (self._connecting_since is not None or silence <= _FRESH):
            _touch(self._file)

    def _answer(self, path: str) -> Reply | None:
        """Return the answer of a path, in a thread of the endpoint; ``None`` if unknown."""
        match path:
            case "/livez":
                return self._reply(self._is_alive())
            case "/readyz":
                return self._reply(is_ready(self._current()))
            case "/startupz":
                why = () if self._has_started else ("no replica has been ready yet",)
                return self._reply(Verdict(is_ok=self._has_started, why=why))
            case "/metrics":
                return self._metrics()
        return None

    def _current(self) -> snapshot.Worker:
        """Return the last snapshot; a loop that waits for the broker makes no new one."""
        seen, since = self._seen, self._connecting_since
        if since is None:
            return seen
        silence = time.monotonic() - since
        reason = f"no connection to the broker for {silence:.0f} s"
        return dataclasses.replace(seen, broker_outage=reason)

    def _is_alive(self) -> Verdict:
        since, now = self._connecting_since, time.monotonic()
        if since is not None:
            return Verdict(is_ok=True, why=(f"connects to the broker for {now - since:.0f} s",))
        silence = now - self._beat_at
        if silence <= self._settings.heartbeat_timeout:
            return Verdict(is_ok=True)
        return Verdict(is_ok=False, why=(f"the worker's loop has not turned for {silence:.0f} s",))

    def _reply(self, verdict: Verdict) -> Reply:
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
        return Reply(status=200 if verdict.is_ok else 503, body=json.dumps(answer).encode())

    def _metrics(self) -> Reply:
        """Answer a scrape; the first one loads the Prometheus library."""
        try:
            renderer: Any = importlib.import_module(_RENDERER)
        except errors.ConfigurationError as exc:
            body = f"{exc}\n".encode()
            return Reply(status=501, body=body, content_type="text/plain; charset=utf-8")
        page = renderer.Page(self._current, self._queues)
        return Reply(body=page(), content_type=page.content_type)


def _touch(path: str) -> None:
    with open(path, "ab"):
        os.utime(path)


class _Endpoint(http.server.ThreadingHTTPServer):
    """Serves GET on the paths that ``answer`` knows, as soon as it exists.

    Raises:
        ConfigurationError: if it cannot listen on the address.
    """

    def __init__(self, host: str, port: int, answer: Callable[[str], Reply | None]) -> None:
        # The base class binds to IPv4 only, and looks this machine's name up in DNS.
        super().__init__((host, port), _Request, bind_and_activate=False)
        self.socket.close()
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self.socket = socket.create_server((host, port), family=family, backlog=_MOST_CLIENTS)
        except OSError as exc:
            raise errors.ConfigurationError(
                f"gw_health_port={port}: cannot listen on {host}: {exc.strerror or exc}; choose a "
                f"free port for each worker of the machine, 0 for any, or None for no endpoint"
            ) from exc
        self.socket.setblocking(False)  # a client may leave before it is accepted
        host, port = self.socket.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.answer = answer
        #: The connections that have a thread, those that were cut off, too, the oldest first.
        self._clients: dict[Any, bool] = {}
        threading.Thread(target=self.serve_forever, name="gw-http", daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client in a thread; where there are too many, the oldest clients are cut off."""
        if len(clients := list(self._clients)) >= _MOST_THREADS:
            self.shutdown_request(request)
            return
        for oldest in clients[: max(0, len(clients) + 1 - _MOST_CLIENTS)]:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        self._clients[request] = True
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Release a client, also if no thread could be started for it."""
        super().shutdown_request(request)
        self._clients.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        exc = sys.exception()
        if not isinstance(exc, OSError):  # an OSError is a client that left
            logger.error(
                "the health endpoint failed for %s: report this bug", client_address, exc_info=exc
            )


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE
    error_message_format = "%(message)s"
    error_content_type = "text/plain"
    server: _Endpoint

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            reply = self.server.answer(path)
        except Exception:
            logger.exception("the health endpoint failed for GET %s: report this bug", path)
            self.send_error(http.HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if reply is None:
            self.send_error(http.HTTPStatus.NOT_FOUND)
            return
        self.send_response_only(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the status only, and 405 for an unsupported method."""
        if code == http.HTTPStatus.NOT_IMPLEMENTED:
            code = http.HTTPStatus.METHOD_NOT_ALLOWED
        super().send_error(code)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        logger.debug(format, *args)
