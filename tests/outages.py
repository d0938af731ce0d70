"""Servers that a test stops and starts again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from gw_celery import testing


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
