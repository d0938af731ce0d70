"""Where a server lives: the lock on its data folder, and the path of its socket."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import IO

from gw_celery import errors
from gw_celery.devserver.polling import poll

#: A unix socket's path ends at 107 bytes; kombu's URL takes these characters as they are.
SOCKET_PATH = re.compile(rb"[A-Za-z0-9/._-]{1,104}")
#: An owner that is being stopped may need this long to let go.
HANDOVER = 2.0
#: The server of an owner that was killed leaves by itself; on a loaded machine it takes longer.
ORPHAN = 20.0


def make(data_dir: Path) -> None:
    """Make the folder where it is missing, readable to its user alone."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ServerFailed(
            f"{data_dir} cannot be the server's folder ({error.strerror}): choose another data_dir"
        ) from error


def take(data_dir: Path) -> IO[str]:
    """Lock ``data_dir``. The server inherits the lock, so it holds until the server is gone."""
    lock = _open(data_dir / "server.lock")
    if not (
        poll(lambda: _lock(lock), HANDOVER)
        or (not _owner_lives(lock) and poll(lambda: _lock(lock), ORPHAN))
    ):
        with lock:
            holder = _holder(lock)
        raise errors.ServerFailed(
            f"{holder} already uses {data_dir}: stop it first, or choose another data_dir"
        )
    note(lock, f"a server that process {os.getpid()} is starting")
    return lock


def _open(path: Path) -> IO[str]:
    with path.open("a+") as opened:
        # The watcher is a shell script, and its own redirections take the numbers below 10: were
        # the lock one of them, the server would not inherit it.
        return os.fdopen(fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 10), "a+")


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read() or "a server that is being started"


def _owner_lives(lock: IO[str]) -> bool:
    """Whether the process lives that the lock's holder names; unknown owners do."""
    owner = re.search(r"process (\d+)", _holder(lock))
    if owner is None:
        return True
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def note(lock: IO[str], holder: str) -> None:
    lock.truncate(0)
    lock.write(holder)
    lock.flush()


def socket_path(data_dir: Path) -> Path:
    path = data_dir / "server.sock"
    if SOCKET_PATH.fullmatch(os.fsencode(path)):
        return path
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    for parent in (tempfile.gettempdir(), "/tmp"):
        path = Path(parent, f"gw-celery-{os.getuid()}-{name}", "s.sock")
        if SOCKET_PATH.fullmatch(os.fsencode(path)):
            break
    _make_private(path.parent)
    return path


def _make_private(folder: Path) -> None:
    """Make a folder that is ours alone: others can write where it lies."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or stat.S_IMODE(status.st_mode) & 0o077
    ):
        raise errors.ServerFailed(
            f"{folder} for the server's socket is not a private folder of this user: remove it"
        )
