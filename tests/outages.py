"""Servers that a test stops and starts again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from gw_celery import testing
from tests.processes import eventually


class Outage:
    """A server that a test stops and starts again, on the same data and address."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running = ExitStack()
        self.start()

    def stop(self) -> None:
        self._running.close()

    def start(self) -> None:
        self.server = self._running.enter_context(testing.server(self._directory))

    @contextmanager
    def being(self, kind: str) -> Iterator[None]:
        """Have the server be ``down``, ``frozen``, or refuse in one of ``REFUSALS``."""
        if kind == "down":
            self.stop()
            yield
            self.start()
        elif kind == "frozen":
            os.kill(self.server.pid, signal.SIGSTOP)
            try:
                yield
            finally:
                os.kill(self.server.pid, signal.SIGCONT)
        else:
            with refusing(self.server.socket, kind):
                yield

    def states(self, sent: list[str]) -> set[str]:
        """What is stored; an ``AsyncResult`` would subscribe, and fail with its server."""
        with redis.Redis(unix_socket_path=str(self.server.socket), db=1) as client:
            stored = client.mget([f"celery-task-meta-{one}" for one in sent])
        return {json.loads(one)["status"] if one else "PENDING" for one in stored}


@contextmanager
def outage(directory: Path) -> Iterator[Outage]:
    made = Outage(directory)
    try:
        yield made
    finally:
        made.stop()


#: Ways in which a server that is there refuses to store.
REFUSALS = ("READONLY", "OOM", "NOPERM", "BUSY")


@contextmanager
def refusing(address: Path | str, kind: str) -> Iterator[None]:
    """Have the server at a Unix socket refuse to write in one of ``REFUSALS``."""
    with redis.Redis(unix_socket_path=str(address)) as client:
        if kind == "READONLY":
            client.replicaof("127.0.0.1", "1")
            yield
            client.replicaof("NO", "ONE")
        elif kind == "OOM":
            client.config_set("maxmemory", 1)
            yield
            client.config_set("maxmemory", 0)
        elif kind == "NOPERM":
            client.acl_setuser("default", enabled=True, commands=["-evalsha", "-eval"])
            yield
            client.acl_setuser("default", enabled=True, categories=["+@all"])
        elif kind == "BUSY":
            client.config_set("lua-time-limit", 1)
            endless = threading.Thread(target=_run_endlessly, args=(address,))
            endless.start()
            eventually(lambda: _is_busy(client))
            yield
            client.script_kill()
            endless.join()
        else:
            raise ValueError(kind)


def _is_busy(client: redis.Redis) -> bool:
    try:
        return not client.ping()
    except redis.ResponseError:
        return True


def _run_endlessly(address: Path | str) -> None:
    with (
        redis.Redis(unix_socket_path=str(address)) as client,
        contextlib.suppress(redis.ResponseError),  # it was killed
    ):
        client.eval("while true do end", 0)
