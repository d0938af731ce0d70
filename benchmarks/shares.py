"""What two workers of speed 1 and 4 get of one queue: at saturation, and at half load.

    python -m benchmarks.shares [redis] [rabbitmq] [--inputs 1000] [--prefetch-multiplier 1]

Each worker has one replica of 32 slots; an input takes 0.5 s on average in one of them and 2 s in
the other. Half load is half of what both can do together, at random moments.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery

import gw_celery as gw
from benchmarks import shares_app
from gw_celery import conf, devserver, testing
from gw_celery.testing.workers import close_results

NAPS = {"quick": 0.5, "slow": 2.0}
CAPACITY = sum(shares_app.SLOTS / nap for nap in NAPS.values())
#: Seconds that workers have for what they must do.
_PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Shares:
    """How many inputs each worker did, and in how many seconds."""

    quick: int
    slow: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.quick / max(1, self.slow)

    def __str__(self) -> str:
        part = 100 * self.quick / max(1, self.quick + self.slow)
        return (
            f"quick {self.quick}, slow {self.slow}: 1:{self.ratio:.2f}, the quick one has "
            f"{part:.1f} % ({(self.quick + self.slow) / self.seconds:.0f} inputs/s)"
        )


def main() -> None:
    """Print the shares of both loads on each broker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("brokers", nargs="*", default=[], choices=["redis", "rabbitmq", []])
    parser.add_argument("--rabbitmq-url", default="amqp://guest:guest@127.0.0.1:5672//")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--prefetch-multiplier", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, devserver.running(Path(folder)) as server:
        urls = {"redis": server.broker_url, "rabbitmq": options.rabbitmq_url}
        for name in options.brokers or urls:
            multiplier = options.prefetch_multiplier
            with pair(urls[name], server.result_url, Path(folder), multiplier) as client:
                if name == "rabbitmq":
                    wait_ranked(client)
                print(f"{name}, saturated: {saturated(client, options.inputs)}", flush=True)
                print(f"{name}, half load: {half_load(client, options.inputs)}", flush=True)


@contextlib.contextmanager
def pair(
    broker: str, result: str, folder: Path, multiplier: int = 1, *, is_quorum: bool = False
) -> Iterator[Celery]:
    """A client of two workers, both ready; the queue is deleted at the end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(conf.talking_to(broker, result))
        client = stack.enter_context(Celery("client", set_as_current=False))
        gw.preset(client)
        stack.callback(close_results, client)
        if is_quorum:
            client.conf.task_create_missing_queue_type = "quorum"
        stack.callback(_delete_queue, client)
        workers = [
            testing.Worker(
                "benchmarks.shares_app:celery",
                *("-Q", shares_app.QUEUE, "-l", "WARNING"),
                *("--prefetch-multiplier", str(multiplier)),
                broker_url=broker,
                result_url=result,
                log_dir=folder,
                env={"WHO": who, "NAP": str(nap), "QUORUM": "1" if is_quorum else ""},
            )
            for who, nap in NAPS.items()
        ]
        for worker in workers:
            stack.callback(worker.stop)
        for worker in workers:
            worker.wait_ready()
        yield client


def wait_ranked(client: Celery) -> None:
    """Wait until each worker knows how quick it is beside the other."""

    def is_ranked() -> bool:
        answers = client.control.inspect(timeout=1.0, limit=2)._request("gw_status") or {}
        bands = [band for one in answers.values() for band in one["bands"].values()]
        return sorted(bands) == ["quick", "slow"]

    testing.eventually(is_ranked, _PATIENCE)


def saturated(client: Celery, inputs: int) -> Shares:
    """Send everything at once; count while there is a backlog for both."""
    sent = [_send(client, number) for number in range(inputs)]
    since = time.time()
    done = _answers(sent)
    # When all but what is in flight is done, nothing is left for the quicker one to pull.
    end = sorted(at for _, at in done)[-len(NAPS) * shares_app.SLOTS]
    return _counted(done, since, end)


def half_load(client: Celery, inputs: int, seed: int = 5) -> Shares:
    """Send at random moments, half as many a second as both workers can do."""
    chance, began = random.Random(seed), time.time()
    sent, due = [], began
    for number in range(inputs):
        due += chance.expovariate(CAPACITY / 2)
        time.sleep(max(0.0, due - time.time()))
        sent.append(_send(client, number))
    return _counted(_answers(sent), began, time.time())


def _send(client: Celery, number: int) -> Any:
    return client.send_task(shares_app.TASK, (number,), queue=shares_app.QUEUE)


def _answers(sent: list[Any]) -> list[tuple[str, float]]:
    return [one.get(timeout=_PATIENCE) for one in sent]


def _counted(done: list[tuple[str, float]], begin: float, end: float) -> Shares:
    counts = collections.Counter(who for who, at in done if begin <= at < end)
    return Shares(counts["quick"], counts["slow"], end - begin)


def _delete_queue(client: Celery) -> None:
    with client.connection_for_write() as connection:
        client.amqp.queues[shares_app.QUEUE].bind(connection.default_channel).delete()


if __name__ == "__main__":
    main()
