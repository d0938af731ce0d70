"""What a broker tells of its connections and its traffic, for ``benchmarks.cluster``."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import redis

from gw_celery import devserver


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counted since the broker started, but for what is open now."""

    connections: int
    received_bytes: int
    sent_bytes: int
    #: Commands by name; of RabbitMQ frames, to and from it.
    commands: Counter[str]
    channels: int = 0
    #: Queues of the virtual host; of Redis its keys.
    queues: int = 0


class Broker(Protocol):
    url: str
    results: str

    def totals(self) -> Totals: ...


class Redis:
    """A Redis of one's own, and no other traffic on it."""

    def __init__(self, server: devserver.Server) -> None:
        self.url, self.results = server.broker_url, server.result_url
        self.client = redis.Redis(unix_socket_path=str(server.socket))

    def totals(self) -> Totals:
        listed = self.client.info("commandstats")
        commands = Counter(
            {name.removeprefix("cmdstat_"): one["calls"] for name, one in listed.items()}
        )
        # What this process asked is not the workers': it asks nothing else meanwhile.
        for name in ("info", "client|list", "dbsize"):
            commands.pop(name, None)
        connections = len(self.client.client_list()) - 1
        queues = int(self.client.dbsize())
        stats = self.client.info("stats")
        return Totals(
            connections=connections,
            received_bytes=stats["total_net_input_bytes"],
            sent_bytes=stats["total_net_output_bytes"],
            commands=commands,
            queues=queues,
        )

    def published(self, seconds: float) -> dict[str, list[int]]:
        """Listen for so long: the sizes of what was broadcast, by channel without its ids."""
        sizes: dict[str, list[int]] = {}
        end = time.monotonic() + seconds
        with self.client.pubsub(ignore_subscribe_messages=True) as listener:
            listener.psubscribe("*")
            while (left := end - time.monotonic()) > 0:
                if message := listener.get_message(timeout=left):
                    sizes.setdefault(message["channel"].decode(), []).append(len(message["data"]))
        return sizes


class RabbitMQ:
    """A virtual host of one's own."""

    def __init__(self, vhost: str) -> None:
        self._vhost = vhost
        self.url = f"amqp://guest:guest@127.0.0.1:5672/{vhost}"
        self.results = "rpc://"

    def totals(self) -> Totals:
        rows = [row for row in _listed("list_connections", *_COLUMNS) if row[0] == self._vhost]
        channels, received, sent, frames_in, frames_out = (
            sum(int(row[column]) for row in rows) for column in range(1, 6)
        )
        return Totals(
            connections=len(rows),
            received_bytes=received,
            sent_bytes=sent,
            commands=Counter({"frames in": frames_in, "frames out": frames_out}),
            channels=channels,
            queues=len(_listed("list_queues", "-p", self._vhost, "name")),
        )


_COLUMNS = ("vhost", "channels", "recv_oct", "send_oct", "recv_cnt", "send_cnt")


@contextmanager
def redis_broker() -> Iterator[Redis]:
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        yield Redis(server)


@contextmanager
def rabbitmq_broker() -> Iterator[RabbitMQ]:
    """One on the RabbitMQ of this machine, which ``rabbitmqctl`` must be able to steer."""
    vhost = f"gw-cluster-{uuid4().hex[:8]}"
    _control("add_vhost", vhost)
    try:
        _control("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
        yield RabbitMQ(vhost)
    finally:
        _control("delete_vhost", vhost)


BROKERS = {"redis": redis_broker, "rabbitmq": rabbitmq_broker}


def _listed(*arguments: str) -> list[list[str]]:
    lines = _control(*arguments, "--no-table-headers").splitlines()
    return [line.split("\t") for line in lines if line]


def _control(*arguments: str) -> str:
    program = shutil.which("rabbitmqctl") or shutil.which("rabbitmqctl", path="/usr/sbin")
    if program is None:
        raise SystemExit("rabbitmqctl is not on PATH: measure --broker redis alone")
    command = [program, "-q", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
