"""What Celery, operators and the autoscaler ask of a pool, and see of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.utils.imports import symbol_by_name

import gw_celery as gw
from tests import pool_harness
from tests.pool_harness import Harness

StartPool = Callable[..., Harness]


async def on_a_gpu() -> None: ...


@pytest.fixture
def on_three_gpus(start_pool: StartPool, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """A pool of one replica, of two slots, on a machine for three."""
    monkeypatch.setenv("GW_FAKE_GPUS", "A100:3")

    def declare(app: gw.App) -> None:
        app.remote(gpu=gw.Gpu("A100"))(on_a_gpu)

    return start_pool({}, declare=declare)


def numbers(harness: Harness) -> list[int]:
    """The replicas that are wanted."""
    harness.advance(2.0)
    return [seen.number for seen in harness.pool.snapshot().replicas]


def test_slots_grow_in_whole_replicas(on_three_gpus: Harness) -> None:
    on_three_gpus.pool.grow(1)
    assert numbers(on_three_gpus) == [0, 1]
    on_three_gpus.pool.grow(3)
    assert numbers(on_three_gpus) == [0, 1, 2]
    on_three_gpus.pool.shrink(2)
    assert on_three_gpus.pool.num_processes == 4
    assert numbers(on_three_gpus) == [0, 1]


def test_celerys_autoscaler_gets_what_fits_and_the_log_says_so(
    on_three_gpus: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    on_three_gpus.pool.grow(100)
    assert (on_three_gpus.pool.num_processes, numbers(on_three_gpus)) == (6, [0, 1, 2])
    assert "grows by fewer than 100 slots: 51 replicas were asked for, and 3 fit" in caplog.text


def test_what_does_not_fit_is_known_before(on_three_gpus: Harness) -> None:
    assert on_three_gpus.pool.refusal(6) is None
    assert "4 replicas were asked for, and 3 fit" in str(on_three_gpus.pool.refusal(7))


def test_each_replica_has_the_devices_of_its_number(on_three_gpus: Harness) -> None:
    on_three_gpus.pool.grow(4)
    on_three_gpus.advance(2.0)
    seen = [replica.devices for replica in on_three_gpus.pool.snapshot().replicas]
    assert len({token for devices in seen for token in devices}) == 3
    for child in on_three_gpus.children:
        assert child.environment["CUDA_VISIBLE_DEVICES"] == ",".join(seen[child.number])


@pytest.mark.parametrize("inherited", [None, "", "3"])
def test_a_child_without_devices_sees_what_the_worker_sees(
    start_pool: StartPool, monkeypatch: pytest.MonkeyPatch, inherited: str | None
) -> None:
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    assert start_pool().child(0).environment.get("CUDA_VISIBLE_DEVICES") == inherited


def test_the_snapshot_has_what_was_asked_for_and_which_queues_are_open(
    start_pool: StartPool,
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


def test_operators_see_when_each_tick_of_beat_came_last(harness: Harness) -> None:
    assert harness.info()["gw_tick_ages"] == {}
    harness.pool.probe_tick()
    harness.advance(3.0)
    harness.pool.benchmark_tick()
    ages = harness.info()["gw_tick_ages"]
    assert ages == {"probe": pytest.approx(4.0), "benchmark": pytest.approx(1.0)}


def test_the_pool_begins_and_ends_the_autoscaler_of_its_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Celery starts one only where there is no event loop, and tells none of the end."""
    heard: list[str] = []
    made: Any = symbol_by_name(pool_harness.POOL)

    class Scaled(made):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.autoscaler = SimpleNamespace(
                begin=lambda: heard.append("begins"), end=lambda: heard.append("ends")
            )

    monkeypatch.setattr(pool_harness, "POOL", Scaled)
    with Harness().running() as harness:
        assert heard == ["begins"]
        harness.stop()
    assert heard == ["begins", "ends"]
