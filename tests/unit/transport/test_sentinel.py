"""Our transport on the master that a Sentinel names."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gw_celery import devserver
from tests.processes import eventually
from tests.redis_readers import held, reading, reclaim, send, tags


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(directory: Path, port: int, *arguments: str) -> Iterator[redis.Redis]:
    program = devserver.find_program()
    given = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    with (
        (directory / f"{port}.log").open("wb") as log,
        subprocess.Popen([program, *arguments, *given], stdout=log, stderr=log) as process,
        redis.Redis(port=port) as client,
    ):
        try:
            eventually(lambda: _answers(client))
            yield client
        finally:
            process.terminate()


def _answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


@pytest.fixture
def master(tmp_path: Path) -> Iterator[tuple[redis.Redis, str]]:
    """The master, and the URL of its Sentinel."""
    port, sentinel_port = free_port(), free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {port} 1\n")
    with (
        running(tmp_path, port, "--save", "") as client,
        running(tmp_path, sentinel_port, str(config), "--sentinel"),
    ):
        yield client, f"sentinel://127.0.0.1:{sentinel_port}"


def test_messages_of_the_master_are_taken_held_acknowledged_and_given_back(
    master: tuple[redis.Redis, str],
) -> None:
    server, url = master
    options = {"master_name": "main"}
    send(url, range(100), transport_options=options)
    with reading(url, transport_options=options) as reader:
        reader.read(100)
        assert reader.numbers() == list(range(100))
        assert held(server) == tags(reader)
        for message in reader.messages[:60]:
            message.ack()
        eventually(lambda: reader.turn() or len(held(server)) == 40, 5, 0)
        assert reclaim(server, reader) == 40
        assert server.llen("q") == 40
