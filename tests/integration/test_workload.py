"""Workload from the caller to the worker's tallies, with a real worker on Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import weighed
from celery import chain, chord

from gw_celery import testing
from tests import pooling
from tests.processes import WorkerProcess, eventually

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    with pooling.module_worker(redis_server, tmp_path_factory, module="weighed") as started:
        yield started


def tallies(worker: WorkerProcess, service: str) -> dict[str, float]:
    """What ``inspect stats`` says of a service; nothing while it has seen no input."""
    stats = eventually(lambda: pooling.ask(worker, "stats", weighed.celery), 20)
    found: dict[str, float] = stats["pool"]["gw_tallies"].get(f"weighed.{service}", {})
    return found


def served(worker: WorkerProcess, service: str, workload: float) -> dict[str, float]:
    """The tallies of a service once so much was served: an answer may come before its report."""
    return eventually(lambda: _settled(tallies(worker, service), workload), 20)


def test_every_way_of_calling_is_tallied_by_its_workload(worker: WorkerProcess) -> None:
    async def awaited() -> list[str]:
        return [await weighed.weigh("a", size=2), await weighed.weigh.spawn("b", size=4)]

    assert asyncio.run(awaited()) == ["a", "b"]
    assert weighed.weigh.remote("c", size=8) == "c"
    assert weighed.weigh.delay("d", size=16).get(timeout=20) == "d"
    assert weighed.weigh.apply_async(("e",), {"size": 32}).get(timeout=20) == "e"
    assert weighed.weigh.s("f", size=64).delay().get(timeout=20) == "f"
    foreign = weighed.celery.send_task("weighed.weigh", ("g", 0.0, 128), queue="cpu.weigh")
    assert foreign.get(timeout=20) == "g"
    odd = {"gw-workload": "much"}
    sent = weighed.celery.send_task("weighed.weigh", ("h",), queue="cpu.weigh", headers=odd)
    assert sent.get(timeout=20) == "h"
    counted = served(worker, "weigh", 128.0)
    assert counted["arrived"] == 128.0
    assert (counted["arrived_inputs"], counted["served_inputs"]) == (8, 8)


def test_methods_of_class_tasks_are_weighed_without_self(worker: WorkerProcess) -> None:
    assert weighed.Scale().weigh.delay("a", 5).get(timeout=20) == "a"
    assert served(worker, "Scale", 5.0)


def test_a_retry_is_weighed_by_the_arguments_that_it_has(worker: WorkerProcess) -> None:
    assert weighed.tried.delay("a", 7).get(timeout=20) == [7.0, 7.0, 8.0]
    assert served(worker, "tried", 22.0)


def test_the_next_task_of_a_chain_has_a_workload_of_its_own(worker: WorkerProcess) -> None:
    line = chain(weighed.weigh.s("a", size=3), weighed.headers_of.s())
    assert line.delay().get(timeout=20) == {}, "it has no calculator"
    line = chain(weighed.weigh.s("a", size=3), weighed.weigh.s(size=9), weighed.weigh.s(size=27))
    before = tallies(worker, "weigh").get("served", 0.0)
    assert line.delay().get(timeout=20) == "a"
    assert served(worker, "weigh", before + 39.0)
    both = chord([weighed.weigh.s("a", size=3), weighed.weigh.s("b", size=4)])
    assert both(weighed.headers_of.s()).get(timeout=20) == {}


def test_what_waits_and_what_runs_is_told_apart(worker: WorkerProcess) -> None:
    before = tallies(worker, "weigh").get("arrived", 0.0)
    sent: list[Any] = [weighed.weigh.delay(f"n{one}", 2.0, size=10) for one in range(2)]
    eventually(lambda: tallies(worker, "weigh").get("running") == 20.0)
    assert tallies(worker, "weigh")["running_inputs"] == 2
    sent.append(weighed.weigh.delay("next", size=5))
    counted = served(worker, "weigh", before + 25.0)
    assert [one.get(timeout=20) for one in sent] == ["n0", "n1", "next"]
    assert (counted["waiting"], counted["running"]) == (0.0, 0.0)
    assert counted["busy"] > 3.0, "seconds that the inputs had a slot"


def _settled(counted: dict[str, float], served: float) -> dict[str, float]:
    return counted if counted.get("served") == served else {}
