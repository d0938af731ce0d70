"""Wait until a Redis list holds something, without taking anything out of it.

Redis tells a client that a key which it has read was changed ("client-side caching", Redis 6). An
idle worker reads that its lists are empty, and is told of the first message. BRPOP, kombu's way to
wait, takes the message before it can be recorded: a worker killed in between has lost it. It
also waits a second for the lists that it was sent with, even when others are to be read by then.

Design: https://redis.io/docs/latest/develop/reference/client-side-caching/ (two connections).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis
import redis.exceptions

logger = logging.getLogger(__name__)

#: Seconds after which the lists are read again, told or not, and the link is probed.
LOOK_AGAIN = 10.0
#: Seconds for connecting the link, and for what is said over it at its start.
_TIMEOUT = 5.0


class Watch:
    """A link on which Redis tells of changes to what another connection reads.

    Args:
        parameters: of the connection to the server, as kombu makes them.
        hub: the event loop of the worker.
        told: called when something has changed.
    """

    def __init__(self, parameters: dict[str, Any], hub: Any, told: Callable[[], None]) -> None:
        self._hub = hub
        self._told = told
        self._link = _connect(parameters)
        self._id = self._ask("CLIENT", "ID")
        # A subscriber of the older protocol can be told by itself; reading is the other's.
        self._ask("SUBSCRIBE", "__redis__:invalidate")
        self._reader_socket: Any = None
        #: When the lists are to be read again; ``None`` while they are not known to be empty.
        self._look_at: float | None = None
        self._was_woken = False
        self._owes_answer = False
        hub.add_reader(self._link._sock, self._read)

    def follow(self, reader: Any) -> None:
        """Have Redis tell of changes to what ``reader`` reads from now on.

        Raises:
            redis.exceptions.ResponseError: the server or its rules do not allow it.
        """
        if self._reader_socket is not reader._sock or reader._sock is None:
            reader.send_command("CLIENT", "TRACKING", "ON", "REDIRECT", self._id)
            reader.read_response()
            self._reader_socket = reader._sock

    def are_read(self) -> None:
        """The lists are being read; ``were_empty`` follows where nothing is in them."""
        self._was_woken = False

    def were_empty(self, now: float) -> None:
        """Wait, unless something has come since they were read, or others are to be read."""
        if not self._was_woken:
            self._look_at = now + LOOK_AGAIN

    def wake(self) -> None:
        """Read the lists again at the next opportunity."""
        self._look_at = None
        self._was_woken = True

    def is_waiting(self, now: float) -> bool:
        """Whether there is nothing to read; at times the lists are read all the same."""
        if self._look_at is None:
            return False
        if now < self._look_at:
            return True
        self._probe()
        return False

    def close(self) -> None:
        if self._link._sock is not None:
            self._hub.remove_reader(self._link._sock)
        self._link.disconnect()

    def _probe(self) -> None:
        """A link that is dead without a sound would make each first message wait."""
        if self._owes_answer:
            self.close()
            raise redis.exceptions.ConnectionError(
                f"Redis did not answer for {LOOK_AGAIN:.0f} s on the connection that tells of "
                f"new messages"
            )
        self._owes_answer = True
        self._link.send_command("PING")

    def _read(self) -> None:
        try:
            while self._link.can_read(timeout=0):
                answer = self._link.read_response()
                self._owes_answer = False
                if answer[0] == b"message":
                    self.wake()
                    self._told()
        except (OSError, redis.exceptions.ConnectionError):
            self.close()
            raise
        except redis.exceptions.InvalidResponse as exc:
            # Redis 7.0 tells of FLUSHDB, and of any database, in the wrong protocol. Celery
            # connects again after a ConnectionError only; of anything else the worker would end.
            self.close()
            raise redis.exceptions.ConnectionError(
                f"Redis cannot be read on the connection that tells of new messages: {exc}"
            ) from exc

    def _ask(self, *command: Any) -> Any:
        self._link.send_command(*command)
        return self._link.read_response()


def _connect(parameters: dict[str, Any]) -> Any:
    given = {**parameters, "protocol": 2, "decode_responses": False}
    # So that `CLIENT LIST` tells what the connection is for.
    for name, default in (("socket_timeout", _TIMEOUT), ("client_name", "gw_celery-watch")):
        if given.get(name) is None:
            given[name] = default
    # redis-py's own PING fails on a subscriber, which is answered otherwise: after a pause in which
    # every slot was taken it would end the worker. `Watch._probe` is what checks this link.
    given["health_check_interval"] = 0
    given.pop("max_connections", None)
    cls = given.pop("connection_class", redis.Connection)
    link = cls(**given)
    link.connect()
    return link
