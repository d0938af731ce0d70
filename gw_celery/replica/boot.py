"""A child of the pool: loads what its replica serves, then runs what its parent sends.

``python -m gw_celery.replica.boot FD``, where FD is the child's end of the socket.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
from typing import Any

from gw_celery.protocol import frames

_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM)


def main(argv: list[str]) -> None:
    """Serve until the parent says leave, or is gone."""
    _ignore_the_terminal()
    channel = socket.socket(fileno=int(argv[1]))
    os.set_inheritable(channel.fileno(), False)
    setup = _first_frame(channel)
    version = setup.get("version", "an older version")
    if version != frames.version():  # an upgrade under a running worker
        reason = (
            f"gw_celery was upgraded while this worker ran: it has {version}, and a new child "
            f"{frames.version()}; restart this worker"
        )
        channel.sendall(frames.pack_reports([(frames.Report.FAILED, reason)]))
        os._exit(1)
    # The parent's path is what finds anything else.
    sys.path[:] = setup["path"]
    importlib.import_module("celery.platforms").set_pdeathsig("SIGKILL")
    if os.getppid() != setup["parent"]:  # it died before
        os._exit(1)
    code = importlib.import_module("gw_celery.replica.main").run(channel, setup)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that are stuck in a body must not keep the process.
    os._exit(code)


def _ignore_the_terminal() -> None:
    """TERM and INT go to the whole group; only the parent decides when a child ends.

    By handlers that do nothing: what a body starts would inherit an ignored signal, and could not
    be terminated. A new program gets the defaults by itself, a fork by our doing.
    """

    def restore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_GROUP)

    for number in _OF_THE_GROUP:
        signal.signal(number, lambda number, frame: None)
    # Blocked meanwhile: a signal that came before the defaults are back would do nothing.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_GROUP),
        after_in_child=restore,
    )


def _first_frame(channel: socket.socket) -> dict[str, Any]:
    unpacker = frames.Unpacker(frames.MAX_PARENT_FRAME_BYTES)
    while data := channel.recv(65536):
        for payload in unpacker.feed(data):
            ((setup,),) = frames.unpack_orders(payload)
            return dict(setup)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv)
