from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest

from gw_celery import errors
from gw_celery.worker import http


def broken() -> http.Reply:
    raise OSError("the disk is full")


ROUTES: dict[str, http.Route] = {
    "/well": lambda: http.Reply(body=b'{"ok": true}'),
    "/ill": lambda: http.Reply(body=b"{}", status=503),
    "/broken": broken,
    "/long": lambda: http.Reply(body=b"x" * 5_000_000, content_type="text/plain"),
}


@pytest.fixture
def endpoint() -> Iterator[http.Endpoint]:
    made = http.Endpoint("127.0.0.1", 0, ROUTES)
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            made.poll(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    yield made
    is_over.set()
    thread.join()
    made.close()


def ask(endpoint: http.Endpoint, path: str, method: str = "GET") -> tuple[int, bytes, str | None]:
    connection = HTTPConnection(urlsplit(endpoint.address).netloc, timeout=10)
    connection.request(method, path)
    with connection.getresponse() as answer:
        found = (answer.status, answer.read(), answer.headers["Content-Type"])
    connection.close()
    return found


def test_a_path_answers_what_its_route_says(endpoint: http.Endpoint) -> None:
    assert ask(endpoint, "/well") == (200, b'{"ok": true}', "application/json")
    assert ask(endpoint, "/ill")[0] == 503
    assert ask(endpoint, "/well?verbose=1")[0] == 200
    assert ask(endpoint, "/well", "HEAD") == (200, b"", "application/json")


def test_what_is_not_there_is_not_found_and_nothing_can_be_changed(
    endpoint: http.Endpoint,
) -> None:
    assert ask(endpoint, "/")[0] == 404
    assert ask(endpoint, "/../etc/passwd")[0] == 404
    assert ask(endpoint, "/well", "POST")[0] == 405
    assert ask(endpoint, "/well", "DELETE")[0] == 405


def test_a_route_that_fails_is_an_error_and_the_others_are_answered(
    endpoint: http.Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(endpoint, "/broken")[0] == 500
    assert "GET /broken could not be made" in caplog.text
    assert ask(endpoint, "/well")[0] == 200


def test_a_long_answer_comes_whole(endpoint: http.Endpoint) -> None:
    with urllib.request.urlopen(f"{endpoint.address}/long", timeout=10) as answer:
        assert len(answer.read()) == 5_000_000


def test_clients_that_say_nothing_hold_up_nobody_and_are_cut_off(endpoint: http.Endpoint) -> None:
    where = urlsplit(endpoint.address)
    silent = [socket.create_connection((where.hostname, where.port)) for _ in range(50)]
    silent[-1].sendall(b"GET /we")
    assert ask(endpoint, "/well")[0] == 200
    for one in silent:
        one.settimeout(10)
        assert one.recv(1) == b""
        one.close()


def test_a_client_that_makes_room_for_another_may_have_asked_at_the_same_time() -> None:
    endpoint = http.Endpoint("127.0.0.1", 0, ROUTES)
    where = urlsplit(endpoint.address)
    clients = []
    for _ in range(33):  # one more than there is room for, and nobody looks yet at the last
        clients.append(socket.create_connection((where.hostname, where.port), timeout=10))
        if len(clients) < 33:
            endpoint.poll(1.0)
    for one in clients:
        one.sendall(b"GET /well HTTP/1.1\r\n\r\n")
    for _ in range(5):
        endpoint.poll(0.1)
    assert clients[-1].recv(12) == b"HTTP/1.1 200"
    for one in clients:
        one.close()
    endpoint.close()


@pytest.mark.parametrize("words", [b"\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"a" * 9000])
def test_garbage_is_answered_with_an_error(endpoint: http.Endpoint, words: bytes) -> None:
    where = urlsplit(endpoint.address)
    with socket.create_connection((where.hostname, where.port), timeout=10) as client:
        client.sendall(words)
        assert client.recv(12) in (b"HTTP/1.1 405", b"HTTP/1.1 404")
    assert ask(endpoint, "/well")[0] == 200


def test_a_port_in_use_is_refused_with_the_remedy(endpoint: http.Endpoint) -> None:
    port = urlsplit(endpoint.address).port or 0
    with pytest.raises(errors.ConfigurationError, match=r"gw_health_port=\d+: cannot listen on"):
        http.Endpoint("127.0.0.1", port, {})


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"cannot listen on nowhere\.invalid"):
        http.Endpoint("nowhere.invalid", 0, {})
