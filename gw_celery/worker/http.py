"""A small HTTP server for machines that ask a worker how it is: GET on a few paths, no more.

It has threads of its own. A slow client is cut off: after seconds, or when room is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http
import http.server
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from gw_celery import errors

logger = logging.getLogger(__name__)

#: Seconds that a client has for its request, and for reading the answer.
_PATIENCE = 2.0
#: Clients at a time, each with a thread; more wait in the backlog of the socket.
_MOST_CLIENTS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a path answers."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"


#: Answers one path; called in a thread of the endpoint.
Route = Callable[[], Reply]


class Endpoint(http.server.ThreadingHTTPServer):
    """Listens from its making on; ``start`` serves.

    Args:
        host: the address to listen on.
        port: 0 for any that is free.
        routes: what each path answers; it may grow.

    Raises:
        ConfigurationError: when the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        # Not bound by the class: it would ask DNS for this machine's name, and knows IPv4 only.
        super().__init__((host, port), _Request, bind_and_activate=False)
        self.socket.close()
        self.socket = _listen(host, port)
        self.routes = routes
        #: The connections that have a thread, the oldest first.
        self._clients: dict[Any, bool] = {}
        self._free_threads = threading.Semaphore(_MOST_CLIENTS)
        self._loop = threading.Thread(target=self.serve_forever, name="gw-http", daemon=True)

    @property
    def address(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        self._loop.start()

    def close(self) -> None:
        if self._loop.is_alive():
            self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client in a thread; where none is left, the oldest client loses its own."""
        if not self._free_threads.acquire(blocking=False):
            for oldest in list(self._clients)[:1]:
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            if not self._free_threads.acquire(timeout=_PATIENCE):
                self.shutdown_request(request)
                return
        self._clients[request] = True
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Let a client go: however it ended, and when no thread could be started for it, too."""
        super().shutdown_request(request)
        if self._clients.pop(request, False):
            self._free_threads.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        exc = sys.exception()
        if not isinstance(exc, OSError):  # a client that went away
            logger.error("a client of the health endpoint could not be answered", exc_info=exc)


class _Request(http.server.BaseHTTPRequestHandler):
    """Answers one request of a client."""

    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE
    error_message_format = "%(message)s"
    error_content_type = "text/plain"
    server: Endpoint

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        route = self.server.routes.get(path)
        if route is None:
            self.send_error(http.HTTPStatus.NOT_FOUND)
            return
        try:
            reply = route()
        except Exception:
            logger.exception("the answer to GET %s could not be made", path)
            self.send_error(http.HTTPStatus.INTERNAL_SERVER_ERROR)
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
        """Say no more than the status. A method that is missing here is one that is not allowed."""
        if code == http.HTTPStatus.NOT_IMPLEMENTED:
            code = http.HTTPStatus.METHOD_NOT_ALLOWED
        super().send_error(code)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        logger.debug(format, *args)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((host, port), family=family, backlog=_MOST_CLIENTS)
    except OSError as exc:
        raise errors.ConfigurationError(
            f"gw_health_port={port}: cannot listen on {host}: {exc.strerror or exc}; choose a free "
            f"port for each worker of the machine, 0 for any, or None for no endpoint"
        ) from exc
    server.setblocking(False)  # a client may have gone before it is accepted
    return server
