"""A server process that ends with its owner."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gw_celery import errors
from gw_celery.devserver import place
from gw_celery.devserver.polling import poll
from gw_celery.devserver.program import find_program

LOG_LINES = 20

# The server's parent. Its standard input is a pipe that only the owner holds: end-of-file means
# that the owner is gone, even by SIGKILL, on every system and whichever thread had started it
# (Linux' parent-death signal follows the thread). It lives exactly as long as the server.
WATCHER = """
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
trap 'kill -TERM $server' TERM INT HUP
trap 'kill -KILL $server' USR1
{ trap - TERM INT HUP USR1; read -r _ <&3; kill -TERM $server; } &
reader=$!
wait $server; code=$?
while kill -0 $server 2>/dev/null; do wait $server; code=$?; done
kill $reader 2>/dev/null
exit $code
"""


class Server:
    """A running server; ``start`` makes it."""

    def __init__(
        self, data_dir: Path, socket: Path, watcher: subprocess.Popen[bytes], lock: IO[str]
    ) -> None:
        self.data_dir = data_dir
        self.socket = socket
        self.pid = 0
        self._watcher = watcher
        self._lock = lock

    @property
    def broker_url(self) -> str:
        """Database 0, the only one that Flower reads."""
        return f"redis+socket://{self.socket}?virtual_host=0"

    @property
    def result_url(self) -> str:
        return f"redis+socket://{self.socket}?virtual_host=1"

    @property
    def log(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def is_running(self) -> bool:
        return self._watcher.poll() is None

    def wait(self) -> int:
        """Wait until the server ends by itself or by somebody's hand; its exit code."""
        return self._watcher.wait()

    def stop(self, timeout: float = 10.0) -> None:
        """Let the server write its data and end; kill it when it has not after ``timeout``."""
        if self._lock.closed:
            # Stopped before: the socket's path may be a successor's by now.
            return
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
        try:
            self._watcher.wait(timeout)
        except subprocess.TimeoutExpired:
            self._watcher.send_signal(signal.SIGUSR1)
            self._watcher.wait()
        self._clean_up()

    def _clean_up(self) -> None:
        self.socket.unlink(missing_ok=True)
        if self.socket.parent != self.data_dir:
            with contextlib.suppress(OSError):
                self.socket.parent.rmdir()
        self._lock.close()

    def _wait_until_it_answers(self, timeout: float) -> None:
        if not poll(lambda: self._ask_pid() or not self.is_running, timeout):
            raise errors.ServerFailed(self._failure(f"did not answer within {timeout} s"))
        if not self.pid:
            raise errors.ServerFailed(self._failure(f"ended with code {self._watcher.wait()}"))

    def _ask_pid(self) -> int:
        with contextlib.suppress(redis.RedisError), _client(self.socket) as client:
            client.ping()
            self.pid = int(client.info("server")["process_id"])
        return self.pid

    def _failure(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n  ".join((f"the embedded server {what}; the end of {self.log}:", *lines))


def start(
    data_dir: str | os.PathLike[str], *, timeout: float = 10.0, program: str | None = None
) -> Server:
    """Start a server that keeps its data in ``data_dir`` and ends with this process.

    Args:
        data_dir: made when missing; one running server at a time.
        timeout: how long the server may take to load its data and answer.
        program: the server program, instead of ``GW_CELERY_SERVER`` and the search for one.

    Raises:
        ServerNotFound: when there is no server program.
        ServerFailed: when ``data_dir`` cannot be made, a server already runs on it, or the new one
            does not answer.
    """
    command = find_program(program)
    where = Path(data_dir).resolve()
    place.make(where)
    lock = place.take(where)
    try:
        server = _launch(command, where, lock)
    except BaseException:
        lock.close()
        raise
    try:
        server._wait_until_it_answers(timeout)
    except BaseException:
        server.stop(timeout=1.0)
        raise
    place.note(lock, f"server {server.pid} of process {os.getpid()}")
    return server


@contextlib.contextmanager
def running(
    data_dir: str | os.PathLike[str], *, timeout: float = 10.0, program: str | None = None
) -> Iterator[Server]:
    """Run a server for the length of a ``with`` block; arguments as for ``start``."""
    server = start(data_dir, timeout=timeout, program=program)
    try:
        yield server
    finally:
        server.stop()


def _launch(program: str, data_dir: Path, lock: IO[str]) -> Server:
    socket = place.socket_path(data_dir)
    # Nobody can be using it: the lock is ours.
    socket.unlink(missing_ok=True)
    # No TCP port; every write is in the file before it is answered, and on disk within a second.
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "appendonly": "yes",
        "appendfsync": "everysec",
        # Commands alone, and no snapshot in front of them: the next run's program may be older.
        "aof-use-rdb-preamble": "no",
        "save": "",
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with (data_dir / "server.log").open("ab") as log:
        watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCHER, "gw-celery-devserver", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            # A Ctrl-C in the terminal is for the owner, who stops the server last.
            start_new_session=True,
        )
    return Server(data_dir, socket, watcher, lock)


def _client(socket: Path) -> redis.Redis:
    # The caller polls: retries with pauses inside the client would only blur its deadline.
    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=5.0, retry=Retry(NoBackoff(), 0)
    )
