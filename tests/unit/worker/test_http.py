from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest

from gw_celery import errors
from gw_celery.worker import http
from tests.processes import eventually


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
    made.start()
    yield made
    made.close()


@contextmanager
def silent_clients(endpoint: http.Endpoint, count: int) -> Iterator[list[socket.socket]]:
    where = urlsplit(endpoint.address)
    clients = [
        socket.create_connection((where.hostname, where.port), timeout=10) for _ in range(count)
    ]
    yield clients
    for client in clients:
        client.close()


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


def test_clients_that_say_nothing_hold_up_no_other_and_are_cut_off(endpoint: http.Endpoint) -> None:
    with silent_clients(endpoint, 50) as silent:
        silent[-1].sendall(b"GET /we")
        assert ask(endpoint, "/well")[0] == 200
        for client in silent:
            assert client.recv(1) == b""


def test_a_client_that_asks_byte_by_byte_loses_its_thread_to_another(
    endpoint: http.Endpoint,
) -> None:
    with silent_clients(endpoint, 32) as slow:
        for _ in range(10):  # longer than a silent one may last
            for client in slow:
                client.sendall(b"G")
            time.sleep(0.3)
        assert ask(endpoint, "/well")[0] == 200
        assert slow[0].recv(1) == b""
        slow[-1].sendall(b"ET /well HTTP/1.1\r\n\r\n")
        assert slow[-1].recv(12) == b"HTTP/1.1 405"


def test_clients_are_answered_by_so_many_threads_and_no_more(endpoint: http.Endpoint) -> None:
    before = threading.active_count()
    with silent_clients(endpoint, 100):
        most = 0
        for _ in range(20):
            most = max(most, threading.active_count() - before)
            time.sleep(0.05)
    assert 0 < most <= 32
    assert ask(endpoint, "/well")[0] == 200


def test_a_client_is_refused_where_every_thread_is_in_an_answer_that_does_not_end() -> None:
    goes_on = threading.Event()

    def hang() -> http.Reply:
        goes_on.wait(30)
        return http.Reply(body=b"{}")

    endpoint = http.Endpoint("127.0.0.1", 0, {**ROUTES, "/hang": hang})
    endpoint.start()
    with silent_clients(endpoint, 32) as hanging:
        for client in hanging:
            client.sendall(b"GET /hang HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionError):
            ask(endpoint, "/well")
        goes_on.set()
        assert eventually(lambda: ask(endpoint, "/well"))[0] == 200
    endpoint.close()


@pytest.mark.parametrize("words", [b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"a" * 70_000])
def test_garbage_is_answered_with_an_error(endpoint: http.Endpoint, words: bytes) -> None:
    with silent_clients(endpoint, 1) as (client,):
        client.sendall(words)
        assert b"Bad Request" in client.recv(1000) or words.startswith(b"a")
    assert ask(endpoint, "/well")[0] == 200


def test_a_port_in_use_is_refused_with_the_remedy(endpoint: http.Endpoint) -> None:
    port = urlsplit(endpoint.address).port or 0
    with pytest.raises(errors.ConfigurationError, match=r"gw_health_port=\d+: cannot listen on"):
        http.Endpoint("127.0.0.1", port, {})


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"cannot listen on nowhere\.invalid"):
        http.Endpoint("nowhere.invalid", 0, {})
