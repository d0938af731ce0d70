"""What a real Redis spends on what a thousand workers ask of it: they are stood in for by sockets.

    python -m benchmarks.crowd [--nodes 1000] [--services 4]

CPU is that of the server, as it counts it itself; a share of 1 is one core, and Redis has one for
all commands. ``benchmarks.cluster`` says how often a real worker does each of these.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from gw_celery import devserver
from gw_celery.cluster import liveness
from gw_celery.protocol import worker_record
from gw_celery.protocol.worker_record import ServiceRecord, Size, WorkerRecord

#: Seconds between two of Celery's heartbeats.
HEARTBEAT = 2.0
#: kombu keeps a list for each priority.
LISTS = 4
#: Of one heartbeat, as ``benchmarks.cluster`` counts them.
HEARTBEAT_BYTES = 690
#: Workers that read the others' records in a second, all together.
READING = 100
#: Seconds without a beat after which a worker is lost.
TTL = 15


def main() -> None:
    """Print the server's CPU for each, and its share of a core at that many workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--services", type=int, default=4)
    options = parser.parse_args()
    nodes, services = options.nodes, options.services
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        client = redis.Redis(unix_socket_path=str(server.socket))
        empty = client.info("memory")["used_memory"]
        with _subscribers(server.socket, nodes) as heard:
            memory = (client.info("memory")["used_memory"] - empty) / nodes
            print(f"{nodes:,} subscribed connections: {memory / 1024:.1f} KiB of memory each")
            body = b"x" * HEARTBEAT_BYTES
            cost = _cpu(client, 300, lambda: client.publish("crowd", body))
            _print("a broadcast to all", cost, heard() / 300, 1 / 10)
            _print("gossip: everybody's heartbeat to all", cost, heard() / 300, nodes / HEARTBEAT)
        cost = _cpu(client, 2000, lambda: client.publish("unread", body))
        _print("heartbeats without a listener", cost, HEARTBEAT_BYTES, nodes / HEARTBEAT)
        _lengths(client, nodes, services)
        _beats(client, nodes, services)
        _records(client, nodes, services)
        client.close()


def _lengths(client: redis.Redis, nodes: int, services: int) -> None:
    keys = [f"gpu.A100.service{one}{step}" for one in range(services) for step in range(LISTS)]

    def read() -> None:
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.llen(key)
            pipe.execute()

    _print(f"lengths of {services} queues", _cpu(client, 1000, read), 6 * len(keys), nodes)


def _beats(client: redis.Redis, nodes: int, services: int) -> None:
    """Each worker beats and writes its record once a second; all of them are there."""
    script = client.script_load(liveness.BEAT)
    records = [_record(number, services).dumps() for number in range(nodes)]
    turn = 0

    def beat() -> None:
        nonlocal turn
        name = _name(turn % nodes)
        keys = ("alive", f"dead:{name}", "records")
        client.evalsha(script, len(keys), *keys, name, TTL, records[turn % nodes])
        turn += 1

    for _ in range(nodes):
        beat()
    cost = _cpu(client, 2000, beat)
    _print(f"beats, with records of {services} services", cost, 50, nodes)
    print(f"  a record of {services} services is {len(records[0])} bytes")


def _records(client: redis.Redis, nodes: int, services: int) -> None:
    parsing = size = 0.0

    def read() -> None:
        nonlocal parsing, size
        with client.pipeline(transaction=False) as pipe:
            pipe.hgetall("records")
            pipe.zrange("alive", 0, -1)
            written, alive = pipe.execute()
        began = time.thread_time()
        for name, text in written.items():
            worker_record.loads(text, name.decode())
        parsing += time.thread_time() - began
        size = sum(len(name) + len(text) for name, text in written.items())
        size += sum(map(len, alive))

    cost = _cpu(client, 50, read)
    _print(f"reading the records of {nodes:,} workers", cost, size, min(nodes, READING))
    period = max(1.0, nodes / READING)
    print(f"  it costs each worker {1000 * parsing / 50:.0f} ms CPU every {period:.0f} s")


def _name(number: int) -> str:
    return f"gpu@node{number:04}:7f3a9c1e7f3a9c1e.0"


def _record(number: int, services: int) -> WorkerRecord:
    """As long as that of a busy worker."""
    told = {
        f"shop.models.Service{each}": ServiceRecord(
            queues=f"gpu.A100.shop.models.Service{each}",
            slots=256,
            score=2000.1234567,
            taken=123456789.25,
            waiting=12345.5,
            waiting_inputs=40,
            running_inputs=32,
            mean=308.625,
        )
        for each in range(services)
    }
    size = Size(least=1, capacity=8, replicas=4)
    return WorkerRecord(worker=f"gpu@node{number:04}", size=size, services=told)


def _print(title: str, cost: float, sent: float, a_second: float) -> None:
    print(
        f"{title}: {1e6 * cost:,.0f} us of the server each, {a_second:,.1f} a second: "
        f"{cost * a_second:.3f} of a core, {sent * a_second / 1e6:,.1f} MB/s out"
    )


def _cpu(client: redis.Redis, times: int, ask: Callable[[], object]) -> float:
    """CPU of the server for one call of ``ask``."""
    before = _used(client)
    for _ in range(times):
        ask()
    return (_used(client) - before) / times


def _used(client: redis.Redis) -> float:
    told = client.info("cpu")
    return float(told["used_cpu_user"] + told["used_cpu_sys"])


@contextmanager
def _subscribers(path: Path, count: int) -> Iterator[Callable[[], int]]:
    """So many connections that listen; yields how many bytes they have heard since last asked."""
    selector, is_over, heard = selectors.DefaultSelector(), threading.Event(), 0
    sockets = []
    for _ in range(count):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(path))
        one.sendall(b"SUBSCRIBE crowd\r\n")
        one.recv(1000)
        selector.register(one, selectors.EVENT_READ)
        sockets.append(one)

    def listen() -> None:
        nonlocal heard
        while not is_over.is_set():
            for key, _ in selector.select(0.2):
                heard += len(key.fileobj.recv(1 << 20))  # type: ignore[union-attr]

    thread = threading.Thread(target=listen, name="subscribers")
    thread.start()
    asked = 0

    def since() -> int:
        nonlocal asked
        time.sleep(0.5)  # the last of it is on its way
        if not asked:
            asked = heard
        return asked

    try:
        yield since
    finally:
        is_over.set()
        thread.join()
        for one in sockets:
            one.close()


if __name__ == "__main__":
    main()
