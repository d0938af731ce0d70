"""One client process: keeps calls in flight, and prints what it measured as JSON.

python -m benchmarks.peers.client celery MODULE --pid WORKER ...
python -m benchmarks.peers.client http PORT --pid SERVER ...
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
from celery.result import denied_join_result

from benchmarks.peers import window, workloads

START_TIMEOUT = 120.0


class Meter:
    """CPU and memory of a worker with its children, of the broker, and of this process."""

    def __init__(self, worker: int, broker: int) -> None:
        self._worker = psutil.Process(worker)
        self._broker = psutil.Process(broker)

    @property
    def is_alive(self) -> bool:
        return self._worker.is_running() and self._worker.status() != psutil.STATUS_ZOMBIE

    def cpu(self) -> dict[str, float]:
        return {
            "worker_cpu": sum(map(_cpu, self._family())),
            "broker_cpu": _cpu(self._broker),
            "client_cpu": time.process_time(),
        }

    def pss(self) -> int:
        return sum(int(one.memory_full_info().pss) for one in self._family())

    def _family(self) -> list[psutil.Process]:
        return [self._worker, *self._worker.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


class Watch:
    """Gives a run up when its worker ends or does not answer."""

    def __init__(self, meter: Meter, measured: window.Window) -> None:
        self._meter = meter
        self._measured = measured
        self._deadline = time.monotonic() + START_TIMEOUT + measured.warm_up + 3 * measured.seconds

    def check(self) -> None:
        if not self._meter.is_alive:
            raise SystemExit("it ended before it was measured")
        if time.monotonic() > self._deadline:
            raise SystemExit(f"it gave {self._measured.answered} answers and no more")


def over_celery(module: str, measured: window.Window, watch: Watch) -> None:
    """``delay`` from this thread, and one subscription to all results: the same for every worker.

    Celery's own subscribes for each call. What that costs would hide what the workers do.
    """
    peer = importlib.import_module(f"benchmarks.peers.{module}")
    inputs = itertools.cycle(workloads.items(workloads.chosen()))
    sent: dict[str, float] = {}
    checked = 0.0
    with _results(peer.celery.backend) as results, denied_join_result():
        while not measured.is_over:
            while len(sent) < measured.in_flight:
                now = time.perf_counter()
                sent[peer.infer.delay(next(inputs)).id] = now
            if (answer := results.get_message(timeout=0.5)) is not None:
                started = sent.pop(_succeeded(peer.celery.backend, answer["data"]), None)
                if started is not None:  # else it ran twice
                    measured.done(started, time.perf_counter())
            if time.monotonic() - checked > 0.5:
                checked = time.monotonic()
                watch.check()


@contextlib.contextmanager
def _results(backend: Any) -> Iterator[Any]:
    results = backend.client.pubsub(ignore_subscribe_messages=True)
    with contextlib.closing(results):
        results.psubscribe(f"{backend.task_keyprefix.decode()}*")
        yield results


def _succeeded(backend: Any, stored: bytes) -> str:
    """The id of a task that succeeded; its answer is decoded, as a caller would."""
    meta = backend.decode_result(stored)
    if meta["status"] != "SUCCESS":
        raise SystemExit(f"a call failed: {meta['result']!r:.200}")
    return str(meta["task_id"])


async def over_http(port: int, measured: window.Window, watch: Watch) -> None:
    """As many connections as calls in flight, each kept open."""
    await _answers(port, watch)
    inputs = itertools.cycle(workloads.items(workloads.chosen()))
    async with asyncio.TaskGroup() as group:
        for _ in range(measured.in_flight):
            group.create_task(_call_again_and_again(port, inputs, measured))
        while not measured.is_over:
            watch.check()
            await asyncio.sleep(0.05)


async def _answers(port: int, watch: Watch) -> None:
    """Return when the server has answered once."""
    while True:
        watch.check()
        with contextlib.suppress(OSError, EOFError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                await _call(reader, writer, workloads.items(workloads.chosen())[0])
            return
        await asyncio.sleep(0.2)


async def _call_again_and_again(port: int, inputs: Any, measured: window.Window) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        while not measured.is_over:
            sent = time.perf_counter()
            await _call(reader, writer, next(inputs))
            if not measured.is_over:
                measured.done(sent, time.perf_counter())


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, value: Any) -> Any:
    body = json.dumps({"values": [value]}).encode()
    writer.write(
        b"POST /infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
    answer = await reader.readexactly(int(fields["content-length"]))
    status = head.split(" ", 2)[1]
    if status == "503":  # not ready
        raise EOFError
    if status != "200":
        raise SystemExit(f"a call failed with {status}: {answer.decode(errors='replace'):.200}")
    return json.loads(answer)


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["celery", "http"])
    parser.add_argument("target", help="the module of the task, or the port")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--broker-pid", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warm-up", type=float, required=True)
    options = parser.parse_args()
    meter = Meter(options.pid, options.broker_pid)
    workload = workloads.chosen()
    measured = window.Window(
        workload.in_flight, workload.max_batch, options.warm_up, options.seconds, meter.cpu
    )
    watch = Watch(meter, measured)
    if options.kind == "celery":
        over_celery(options.target, measured, watch)
    else:
        asyncio.run(over_http(int(options.target), measured, watch))
    print(json.dumps({**measured.figures(), "pss": meter.pss()}))


if __name__ == "__main__":
    main()
