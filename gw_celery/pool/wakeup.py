"""Wake a selector from another thread, or from a signal handler."""

from __future__ import annotations

import selectors
import socket


class Wakeup:
    """A pair of sockets, one of them in the selector with no data."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._sender, self._receiver = socket.socketpair()
        self._sender.setblocking(False)
        self._receiver.setblocking(False)
        selector.register(self._receiver, selectors.EVENT_READ, None)

    def send(self) -> None:
        """Make the selector return."""
        try:
            self._sender.send(b"\0")
        except (BlockingIOError, OSError):
            return  # it is full of wake-ups, or closed

    def receive(self) -> None:
        """Take the wake-ups that are there."""
        try:
            while self._receiver.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()
