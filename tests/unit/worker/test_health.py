"""The signs of life of a worker with the GPU pool: its health over HTTP, and a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest

from tests.unit.worker.consuming import consuming, soon

PROBES = ("/livez", "/readyz", "/startupz")


class Probed:
    """A worker of one replica, and a platform that asks for its health."""

    def __init__(self, worker: Any, address: str) -> None:
        self.worker = worker
        self.harness = worker.harness
        self.where = urlsplit(address)

    def fetch(self, path: str, method: str = "GET") -> tuple[int, str, bytes]:
        """The status, the content type and the body of an answer."""
        connection = HTTPConnection(self.where.netloc, timeout=10)
        connection.request(method, path)
        with connection.getresponse() as answer:
            fetched = (answer.status, answer.headers["Content-Type"], answer.read())
        connection.close()
        return fetched

    def ask(self, path: str) -> tuple[int, list[str]]:
        """The status of an answer, and its reasons."""
        status, _, body = self.fetch(path)
        return status, json.loads(body)["why"]

    def replicas(self) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = json.loads(self.fetch("/readyz")[2])["replicas"]
        return seen

    def sees(self, **parts: Any) -> None:
        """Have the loop turn, and the pool be in other parts than it is."""
        pool = self.harness.pool
        measure = type(pool).snapshot
        pool.snapshot = lambda: dataclasses.replace(measure(pool), **parts)
        self.harness.advance(1.0)

    @contextmanager
    def silent_clients(self, count: int) -> Iterator[list[socket.socket]]:
        clients = [
            socket.create_connection((self.where.hostname, self.where.port), timeout=10)
            for _ in range(count)
        ]
        yield clients
        for client in clients:
            client.close()


@contextmanager
def probed(
    caplog: pytest.LogCaptureFixture, services: dict[str, int] | None = None, **settings: Any
) -> Iterator[Probed]:
    with caplog.at_level("INFO"), consuming(services, health_port=0, **settings) as worker:
        (address,) = re.findall(r"the worker's health is at (http://[^/]+)/livez", caplog.text)
        yield Probed(worker, address)


@pytest.fixture
def loading(caplog: pytest.LogCaptureFixture) -> Iterator[Probed]:
    """A worker whose replica loads."""
    with probed(caplog, {"work": 2}) as made:
        yield made


@pytest.fixture
def ready(loading: Probed) -> Probed:
    """A worker whose replica is READY."""
    loading.harness.child().ready()
    loading.harness.advance(1.0)
    return loading


def count_threads() -> int:
    """Those of the clients."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


# -- what each path answers --


def test_each_path_answers_from_the_last_second_with_the_reasons(loading: Probed) -> None:
    harness = loading.harness
    loading.sees()
    assert loading.ask("/livez") == (200, [])
    assert loading.ask("/startupz") == (503, ["no replica has been ready yet"])
    status, why = loading.ask("/readyz")
    assert status == 503
    assert len(why) == 1
    assert re.fullmatch(r"no replica is ready for \S+\.work", why[0])
    (replica,) = loading.replicas()
    assert (replica["number"], replica["state"], replica["pid"]) == (
        0,
        "starting",
        harness.child().pid,
    )
    assert re.fullmatch(r"starting for \d s", replica["why"])
    harness.child().ready()
    harness.advance(1.0)
    assert [loading.ask(path) for path in PROBES] == [(200, [])] * 3
    assert loading.replicas()[0]["why"] == ""
    harness.child().die()
    harness.advance(1.0)
    assert [loading.ask(path)[0] for path in PROBES] == [200, 503, 200]


def test_a_replica_says_what_keeps_it_from_inputs(ready: Probed) -> None:
    (replica,) = ready.harness.pool.snapshot().replicas
    probes = (
        SimpleNamespace(kind="readiness", name="Model.health", detail="is ill", is_ok=False),
        SimpleNamespace(kind="liveness", name="Model.lives", detail="", is_ok=True),
    )
    ill = dataclasses.replace(replica, state="unready", seconds_in_state=4.2)
    ready.harness.pool.health.beat(
        dataclasses.replace(
            ready.harness.pool.snapshot(),
            replicas=(
                dataclasses.replace(ill, probes=probes),
                dataclasses.replace(replica, state="failed", last_error="OSError: no weights"),
            ),
        )
    )
    assert [seen["why"] for seen in ready.replicas()] == [
        "unready for 4 s; readiness probe Model.health: is ill",
        f"failed for {replica.seconds_in_state:.0f} s; OSError: no weights",
    ]


def test_a_worker_is_ready_when_each_of_its_services_is_ready_somewhere(ready: Probed) -> None:
    slots = ready.harness.pool.snapshot().ready_slots
    ready.sees(ready_slots=slots | {"proj.other": 0})
    assert ready.ask("/readyz") == (503, ["no replica is ready for proj.other"])
    ready.sees(ready_slots=slots | {"proj.other": 1})
    assert ready.ask("/readyz") == (200, [])


def test_a_worker_of_plain_tasks_is_ready_with_any_replica(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with probed(caplog, {}) as plain:
        plain.sees()
        assert plain.ask("/readyz") == (503, ["no replica is ready for plain tasks"])
        plain.harness.child().ready()
        plain.sees()
        assert plain.ask("/readyz") == (200, [])


def test_a_worker_that_is_scaled_to_zero_is_ready_and_has_started(loading: Probed) -> None:
    loading.harness.pool.shrink(3)
    loading.harness.advance(1.0)
    assert loading.ask("/readyz") == (200, ["no replica is wanted now"])
    assert loading.ask("/startupz") == (200, [])


def test_a_worker_that_stops_is_alive_and_takes_nothing(ready: Probed) -> None:
    harness = ready.harness
    request = harness.submit()
    child = harness.child_of(request)
    child.accept(request)
    heard: list[Any] = []

    def meanwhile() -> None:
        if len(heard) < 2:
            heard.append((ready.ask("/readyz"), ready.ask("/livez")[0]))
        elif len(request.heard) == 1:
            child.done(request)

    harness.stop(meanwhile=meanwhile)
    assert heard[-1] == ((503, ["the worker stops"]), 200)


@pytest.mark.parametrize("desired", [1, 0])
@pytest.mark.parametrize(
    ("outage", "reason"),
    [
        ({"outage": "READONLY"}, "results cannot be stored: READONLY"),
        ({"broker_outage": "OOM"}, "consuming is paused: OOM"),
    ],
)
def test_a_worker_in_an_outage_is_alive_and_not_ready(
    ready: Probed, desired: int, outage: dict[str, str], reason: str
) -> None:
    ready.sees(**outage, desired=desired)
    status, why = ready.ask("/readyz")
    assert status == 503
    assert reason in why
    assert ready.ask("/livez")[0] == 200
    assert "gw_outage 1.0" in ready.fetch("/metrics")[2].decode()
    ready.sees(desired=desired)
    assert ready.ask("/readyz")[0] == 200
    assert "gw_outage 0.0" in ready.fetch("/metrics")[2].decode()


def test_a_loop_that_does_not_turn_is_dead_unless_it_waits_for_the_broker(
    ready: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.harness.now += 31.0
    assert ready.ask("/livez") == (503, ["the worker's loop has not turned for 31 s"])
    heard: list[Any] = []
    connect = kombu.Connection.ensure_connection

    def connecting(*args: Any, **options: Any) -> Any:
        ready.harness.now += 100.0
        heard.extend(ready.ask(path) for path in ("/livez", "/readyz"))
        return connect(*args, **options)

    monkeypatch.setattr(kombu.Connection, "ensure_connection", connecting)
    with ready.worker.make().connection_for_read():
        assert heard == [
            (200, ["connects to the broker for 100 s"]),
            (503, ["consuming is paused: no connection to the broker for 100 s"]),
        ]
    assert ready.ask("/livez") == ready.ask("/readyz") == (200, [])


# -- /metrics --


def test_a_scrape_shows_what_the_loop_saw_last(ready: Probed) -> None:
    status, content_type, page = ready.fetch("/metrics")
    assert (status, content_type[:25]) == (200, "text/plain; version=0.0.4")
    shown = r'gw_ready_slots\{queue="cpu\.work",service="\S+\.work"\} (\d)'
    assert re.findall(shown, page.decode()) == ["2"]
    ready.harness.child().die()
    ready.harness.advance(1.0)
    assert re.findall(shown, ready.fetch("/metrics")[2].decode()) == ["0"]


def test_without_prometheus_client_a_scrape_is_told_what_to_install(
    ready: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gw_celery.contrib.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    status, _, page = ready.fetch("/metrics")
    assert status == 501
    assert b"pip install 'gw-celery[metrics]'" in page


@pytest.fixture
def scrape(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bytes]], None]:
    """Have a function make the pages of a scrape."""

    def install(make: Callable[[], bytes]) -> None:
        class Page:
            content_type = "text/plain"

            def __init__(self, *_: Any) -> None: ...

            def __call__(self) -> bytes:
                return make()

        renderer = SimpleNamespace(Page=Page)
        monkeypatch.setitem(sys.modules, "gw_celery.contrib.prometheus", renderer)

    return install


@pytest.fixture
def goes_on(scrape: Callable[[Callable[[], bytes]], None]) -> threading.Event:
    """Have scrapes hang until the event is set."""
    goes_on = threading.Event()

    def hang() -> bytes:
        goes_on.wait(30)
        return b""

    scrape(hang)
    return goes_on


def test_an_answer_that_fails_is_an_error_and_the_others_come(
    ready: Probed,
    scrape: Callable[[Callable[[], bytes]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> bytes:
        raise OSError("the disk is full")

    scrape(fail)
    assert ready.fetch("/metrics")[0] == 500
    assert "the health endpoint failed for GET /metrics" in caplog.text
    assert ready.fetch("/livez")[0] == 200


def test_a_long_answer_comes_whole(
    ready: Probed, scrape: Callable[[Callable[[], bytes]], None]
) -> None:
    scrape(lambda: b"x" * 5_000_000)
    assert len(ready.fetch("/metrics")[2]) == 5_000_000


def test_answers_that_do_not_end_hold_up_no_other(ready: Probed, goes_on: threading.Event) -> None:
    with ready.silent_clients(32) as hanging:
        for client in hanging:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert ready.fetch("/livez")[0] == 200
        goes_on.set()


# -- clients of all kinds --


def test_threads_whose_answers_do_not_end_are_bounded(
    ready: Probed, goes_on: threading.Event
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            (client,) = stack.enter_context(ready.silent_clients(1))
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert client.recv(1) == b"", "it is refused"
        assert count_threads() <= 128
        goes_on.set()
        soon(lambda: count_threads() <= 32)
    assert ready.fetch("/livez")[0] == 200


def test_what_is_not_there_is_not_found_and_nothing_can_be_changed(ready: Probed) -> None:
    assert ready.fetch("/livez?verbose=1")[0] == 200
    assert ready.fetch("/livez", "HEAD") == (200, "application/json", b"")
    assert ready.fetch("/")[0] == 404
    assert ready.fetch("/../etc/passwd")[0] == 404
    assert ready.fetch("/livez", "POST")[0] == 405
    assert ready.fetch("/livez", "DELETE")[0] == 405


def test_clients_that_say_nothing_hold_up_no_other_and_are_cut_off(ready: Probed) -> None:
    with ready.silent_clients(50) as silent:
        silent[-1].sendall(b"GET /li")
        assert ready.fetch("/livez")[0] == 200
        for client in silent:
            assert client.recv(1) == b""


def test_a_client_that_asks_byte_by_byte_loses_its_thread_to_another(ready: Probed) -> None:
    with ready.silent_clients(32) as slow:
        end = time.time() + 3
        while time.time() < end:  # longer than a silent one may last
            for client in slow:
                client.sendall(b"G")
            time.sleep(0.3)
        assert ready.fetch("/livez")[0] == 200
        assert slow[0].recv(1) == b""
        slow[-1].sendall(b"ET /livez HTTP/1.1\r\n\r\n")
        assert slow[-1].recv(12) == b"HTTP/1.1 405"


def test_clients_are_answered_by_so_many_threads_and_no_more(ready: Probed) -> None:
    with ready.silent_clients(100) as silent:
        for client in silent[:68]:
            client.settimeout(1.5)  # less than a silent one may last
            assert client.recv(1) == b"", "the oldest are cut off at once"
        soon(lambda: count_threads() <= 32)  # each takes a moment to end
    assert ready.fetch("/livez")[0] == 200


@pytest.mark.parametrize("words", [b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"a" * 70_000])
def test_garbage_is_answered_with_an_error(ready: Probed, words: bytes) -> None:
    with ready.silent_clients(1) as (client,):
        client.sendall(words)
        assert b"Bad Request" in client.recv(1000) or words.startswith(b"a")
    assert ready.fetch("/livez")[0] == 200


# -- at the start --


@pytest.fixture
def refused(
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., str]:
    """Why a worker with these settings does not start."""

    def start(**settings: Any) -> str:
        with pytest.raises(SystemExit) as caught, consuming(**settings):
            pass
        assert caught.value.code == 78
        return caplog.text

    return start


def test_a_port_in_use_is_refused_with_the_remedy(
    ready: Probed, refused: Callable[..., str]
) -> None:
    said = refused(health_port=ready.where.port)
    assert f"gw_health_port={ready.where.port}: cannot listen on 127.0.0.1" in said
    assert "choose a free port for each worker of the machine" in said


def test_an_address_that_is_not_this_machines_is_refused(refused: Callable[..., str]) -> None:
    said = refused(health_port=0, health_host="nowhere.invalid")
    assert "cannot listen on nowhere.invalid" in said


@pytest.mark.parametrize("value", [-1, 65536, True, "80", 80.0])
def test_a_port_is_a_port(refused: Callable[..., str], value: object) -> None:
    assert "gw_health_port" in refused(health_port=value)


def test_a_file_that_cannot_be_written_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    said = refused(heartbeat_file=str(tmp_path / "no" / "alive"))
    assert re.search(r"gw_heartbeat_file=.*cannot be written", said)


def test_nothing_is_started_where_nothing_is_configured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"), consuming():
        names = {thread.name for thread in threading.enumerate()}
    assert not names & {"gw-health", "gw-http"}
    assert "health is at" not in caplog.text


# -- the file --


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def test_the_file_is_young_while_the_loop_turns_and_gone_after_a_clean_stop(
    tmp_path: Path,
) -> None:
    file = tmp_path / "alive"
    with consuming(heartbeat_file=str(file)) as worker:
        for _ in range(2):
            os.utime(file, (0, 0))
            soon(lambda: age(file) < 60, 10)
        worker.harness.stop()
        assert not file.exists()


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Wait for the next rounds of the thread that touches the file."""

    def wait() -> None:
        looked: list[str] = []
        clock = time.monotonic

        def watched() -> float:
            looked.append(threading.current_thread().name)
            return clock()

        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", watched)
            soon(lambda: looked.count("gw-health") >= 6, 20)

    return wait


def test_the_file_grows_old_when_the_loop_hangs_and_not_while_it_waits_for_the_broker(
    tmp_path: Path, rounds: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "alive"
    with consuming(heartbeat_file=str(file)) as worker:
        worker.harness.now += 4.0
        os.utime(file, (0, 0))
        rounds()
        assert age(file) > 1000
        connect = kombu.Connection.ensure_connection

        def connecting(*args: Any, **options: Any) -> Any:
            soon(lambda: age(file) < 60, 10)
            return connect(*args, **options)

        monkeypatch.setattr(kombu.Connection, "ensure_connection", connecting)
        with worker.make().connection_for_read():
            pass


def test_a_file_that_cannot_be_touched_any_more_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rounds: Callable[[], None]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "alive"
    with consuming(heartbeat_file=str(file)):
        folder.rename(tmp_path / "away")
        soon(lambda: "cannot be written" in caplog.text, 10)
        rounds()
        assert caplog.text.count("tried again") == 1
        folder.mkdir()
        soon(file.exists, 10)
