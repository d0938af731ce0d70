"""The entry point of a child of the pool: ``python -m gw_celery.replica.boot FD``.

FD is the child's end of the socket to the parent.
"""

from __future__ import annotations

import _thread
import importlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

from gw_celery.protocol import frames

_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM)
#: Begin the names of the threads that run bodies, which end with the process.
_LASTING = ("MainThread", "gw-body", "gw-batch", "asyncio_")
#: Seconds between two looks of a fork of another thread at its parent.
_LOOK = 1.0


def main(argv: list[str]) -> None:
    """Serve until the parent orders the end, or is gone."""
    # A core file would hold inputs and models.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _ignore_the_terminal()
    channel = socket.socket(fileno=int(argv[1]))
    os.set_inheritable(channel.fileno(), False)
    _tie_forks(channel)
    setup = _first_frame(channel)
    version = setup.get("version", "an older version")
    if version != frames.version():  # gw_celery was upgraded while the worker ran
        reason = (
            f"gw_celery was upgraded while this worker ran: it has {version}, and a new child "
            f"{frames.version()}; restart this worker"
        )
        channel.sendall(frames.pack_reports([(frames.Report.FAILED, reason)]))
        os._exit(1)
    # Everything else must be found on the parent's path.
    sys.path[:] = setup["path"]
    importlib.import_module("celery.platforms").set_pdeathsig("SIGKILL")
    if os.getppid() != setup["parent"]:  # the parent died before the call above
        os._exit(1)
    code = importlib.import_module("gw_celery.replica.main").run(channel, setup)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that are stuck in a body must not delay the exit.
    os._exit(code)


def _ignore_the_terminal() -> None:
    """Ignore TERM and INT, which go to the whole process group; only the parent ends a child.

    Handlers that do nothing replace ignored signals, which programs started by a body would
    inherit. A new program gets the default handlers from the kernel, and a fork gets them here.
    """

    def restore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_GROUP)

    for number in _OF_THE_GROUP:
        signal.signal(number, lambda number, frame: None)
    # Blocked during the fork, because a signal before ``restore`` would be lost.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_GROUP),
        after_in_child=restore,
    )


def _tie_forks(channel: socket.socket) -> None:
    """Make each fork of this process leave the channel to it, and end with it.

    A program that a fork executes ends with this process, too.
    """
    parent = 0

    def note_parent() -> None:
        nonlocal parent
        parent = os.getpid()

    def follow(pid: int) -> None:
        while os.getppid() == pid:
            time.sleep(_LOOK)
        os._exit(1)

    def tie() -> None:
        channel.close()
        # The kernel sends the signal when the thread that forked ends.
        if threading.current_thread().name.startswith(_LASTING):
            importlib.import_module("celery.platforms").set_pdeathsig("SIGKILL")
        else:
            _thread.start_new_thread(follow, (parent,))
        if os.getppid() != parent:
            os._exit(1)

    os.register_at_fork(before=note_parent, after_in_child=tie)


def _first_frame(channel: socket.socket) -> dict[str, Any]:
    unpacker = frames.Unpacker(frames.MAX_PARENT_FRAME_BYTES)
    while data := channel.recv(65536):
        for payload in unpacker.feed(data):
            ((setup,),) = frames.unpack_orders(payload)
            return dict(setup)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv)
