"""A tiny HTTP endpoint for machines that ask a worker how it is: GET on a few paths, no more.

One thread drives it, and no client can hold it up: sockets do not block, and whoever has not asked
and read within seconds is cut off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http
import logging
import selectors
import socket
import time
from collections.abc import Callable, Mapping

from gw_celery import errors

logger = logging.getLogger(__name__)

#: Seconds that a client has for its request and its answer.
_PATIENCE = 2.0
#: Clients at a time; more wait in the backlog of the socket.
_MOST_CLIENTS = 32
_MOST_BYTES = 8 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a path answers."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"


#: Answers one path; called in the endpoint's thread.
Route = Callable[[], Reply]


class _Client:
    """One connection: what came, what is left to send, and until when."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.request = b""
        self.reply = b""
        self.deadline = time.monotonic() + _PATIENCE


class Endpoint:
    """Listens from its making on; ``poll`` serves.

    Args:
        host: the address to listen on.
        port: 0 for any that is free.
        routes: what each path answers; it may grow.

    Raises:
        ConfigurationError: when the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        self._server = _listen(host, port)
        self._clients: dict[socket.socket, _Client] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    @property
    def address(self) -> str:
        host, port = self._server.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def poll(self, timeout: float) -> None:
        """Serve who is there, waiting ``timeout`` seconds at most for somebody."""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._server:
                self._accept()
            elif (one := self._clients.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                self._serve(one)  # who was not dropped meanwhile to make room for another
        now = time.monotonic()
        for late in [one for one in self._clients.values() if now >= one.deadline]:
            self._drop(late)

    def close(self) -> None:
        for one in list(self._clients.values()):
            self._drop(one)
        self._selector.close()
        self._server.close()

    def _accept(self) -> None:
        if len(self._clients) >= _MOST_CLIENTS:
            oldest = min(self._clients.values(), key=lambda one: one.deadline)
            self._drop(oldest)
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._clients[connection] = _Client(connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, one: _Client) -> None:
        try:
            is_over = self._write(one) if one.reply else self._read(one)
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        if is_over:
            self._drop(one)

    def _read(self, one: _Client) -> bool:
        """Read a request and begin to answer it; whether this was the client's last word."""
        data = one.connection.recv(_MOST_BYTES)
        one.request += data
        is_whole = b"\r\n\r\n" in one.request or len(one.request) >= _MOST_BYTES
        if not is_whole:
            return not data
        one.reply = self._answer(one.request)
        self._selector.modify(one.connection, selectors.EVENT_WRITE)
        return False

    def _write(self, one: _Client) -> bool:
        """Send what the socket takes; whether that was all."""
        sent = one.connection.send(one.reply)
        one.reply = one.reply[sent:]
        return not one.reply

    def _drop(self, one: _Client) -> None:
        del self._clients[one.connection]
        self._selector.unregister(one.connection)
        one.connection.close()

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0].decode("latin-1")
        route = self._routes.get(path)
        if method not in (b"GET", b"HEAD"):
            reply = _problem(http.HTTPStatus.METHOD_NOT_ALLOWED)
        elif route is None:
            reply = _problem(http.HTTPStatus.NOT_FOUND)
        else:
            reply = _call(route, path)
        head = (
            f"HTTP/1.1 {reply.status} {http.HTTPStatus(reply.status).phrase}\r\n"
            f"Content-Type: {reply.content_type}\r\n"
            f"Content-Length: {len(reply.body)}\r\n"
            "Cache-Control: no-store\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else reply.body)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((host, port), family=family, backlog=_MOST_CLIENTS)
    except OSError as exc:
        raise errors.ConfigurationError(
            f"gw_health_port={port}: cannot listen on {host}: {exc.strerror or exc}; choose a free "
            f"port for each worker of the machine, 0 for any, or None for no endpoint"
        ) from exc
    server.setblocking(False)
    return server


def _call(route: Route, path: str) -> Reply:
    try:
        return route()
    except Exception:  # the others must still be answered
        logger.exception("the answer to GET %s could not be made", path)
        return _problem(http.HTTPStatus.INTERNAL_SERVER_ERROR)


def _problem(status: http.HTTPStatus) -> Reply:
    return Reply(status=status, body=status.phrase.encode(), content_type="text/plain")
