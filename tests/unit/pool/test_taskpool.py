from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import gw_celery as gw
from gw_celery import conf, signals
from gw_celery.gpus import allocation, devices
from gw_celery.pool import taskpool
from gw_celery.protocol import snapshot
from gw_celery.worker import plan as worker_plan
from tests.pool_harness import Harness


@pytest.fixture
def sizes() -> list[int]:
    return []


@pytest.fixture
def pool(app: gw.App, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> taskpool.TaskPool:
    """A pool of one replica on a machine for three, which notes how many it wants."""
    app.remote(gpu=gw.Gpu("A100"))(body)
    plan = worker_plan.Plan(
        registries=[app.registry],
        served=list(app.registry.services.values()),
        settings=conf.Settings(),
        pool=worker_plan.GPU_POOL,
        allotment=allocation.allot(
            [allocation.Need(kind="A100")], devices.fakes("A100:3", ["A100"])
        ),
    )
    monkeypatch.setattr(signals, "_plan", plan)
    made: Any = taskpool.TaskPool(2, app=app.celery)
    made.supervisor = SimpleNamespace(resize=sizes.append)
    return made


async def body(x): ...


def test_slots_grow_in_whole_replicas(pool: taskpool.TaskPool, sizes: list[int]) -> None:
    pool.grow(1)
    pool.grow(3)
    pool.shrink(2)
    assert (pool.num_processes, sizes) == (4, [2, 3, 2])


def test_celerys_autoscaler_gets_what_fits_and_the_log_says_so(
    pool: taskpool.TaskPool, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    pool.grow(100)
    assert (pool.num_processes, sizes) == (6, [3])
    assert "grows by less than 100 slots: 51 replicas were asked for, and 3 fit" in caplog.text


def test_what_does_not_fit_is_known_before(pool: taskpool.TaskPool) -> None:
    assert pool.refusal(6) is None
    assert "4 replicas were asked for, and 3 fit" in str(pool.refusal(7))


def test_the_snapshot_has_what_was_asked_for_and_which_queues_are_open(
    start_pool: Callable[..., Harness],
) -> None:
    harness = start_pool({"work": 2}, replicas=2)
    seen = harness.pool.snapshot()
    assert (seen.hostname, seen.desired, seen.desired_slots) == ("harness@test", 2, 6)
    assert sorted(seen.ready_slots.values()) == [2, 4]
    assert (seen.open_queues, seen.closed_queues) == (("celery", "cpu.work"), ())
    harness.pool.hold(None)
    harness.pool.shrink(1)
    seen = harness.pool.snapshot()
    assert (seen.desired, seen.desired_slots) == (2, 5), "slots come in whole replicas"
    assert set(seen.ready_slots.values()) == {0}
    assert (seen.open_queues, seen.closed_queues) == ((), ("celery", "cpu.work"))
    assert not seen.is_stopping
    harness.pool.close()
    assert harness.pool.snapshot().is_stopping


def test_a_tick_is_passed_on_and_remembered_with_its_time(pool: taskpool.TaskPool) -> None:
    passed_on: list[str] = []
    pool.supervisor = SimpleNamespace(  # type: ignore[assignment]
        probe_tick=lambda: passed_on.append("probe"),
        measure_again=lambda: passed_on.append("benchmark"),
    )
    pool.probe_tick()
    pool.benchmark_tick()
    assert passed_on == ["probe", "benchmark"]
    assert list(pool._ticked) == ["probe", "benchmark"]


def test_the_snapshot_has_what_the_autoscaler_decided_last(
    start_pool: Callable[..., Harness],
) -> None:
    harness = start_pool({"work": 2})
    assert harness.pool.snapshot().scaling is None
    harness.pool.scaling = snapshot.Scaling(least=1, most=4, why="7 inputs wait")
    assert harness.pool.snapshot().scaling == harness.pool.scaling
