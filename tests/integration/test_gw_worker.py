"""``celery -A proj gw worker``: replicas, each with its devices, on a machine with fake GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import deviced
import pytest
from celery.result import AsyncResult, allow_join_result

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

StartGw = Callable[..., WorkerProcess]


@pytest.fixture(autouse=True)
def _every_device_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def start_gw(start_worker: StartWorker) -> StartGw:
    """Start ``celery gw worker`` on a machine with these GPUs, and wait until it is READY."""

    def start(
        gpus: str, *arguments: str, replicas: int, env: dict[str, str] | None = None, **given: Any
    ) -> WorkerProcess:
        verb = ["gw", "worker", *arguments]
        env = {"GW_FAKE_GPUS": gpus, **(env or {})}
        worker = start_worker("deviced:celery", verb=verb, queues=None, env=env, **given)
        pooling.wait_loaded(worker, replicas)
        return worker

    return start


def listed(worker: WorkerProcess) -> list[dict[str, Any]]:
    return pooling.replicas(worker, deviced.celery)


def shown(worker: WorkerProcess) -> dict[int, list[str]]:
    """The devices of each replica, as ``inspect stats`` shows them."""
    return {one["number"]: one["devices"] for one in listed(worker)}


def pids(worker: WorkerProcess) -> dict[int, int]:
    return {one["number"]: one["pid"] for one in listed(worker) if one["state"] == "ready"}


def consumed(worker: WorkerProcess) -> list[str]:
    return sorted(one["name"] for one in pooling.ask(worker, "active_queues", deviced.celery))


def told(task: Any, count: int) -> dict[str, str]:
    """What the bodies of ``count`` calls saw, by replica."""
    calls: list[AsyncResult[Any]] = [task.delay() for _ in range(count)]
    with allow_join_result():
        answers = [call.get(timeout=20) for call in calls]
    return {replica: visible for replica, _, visible in answers}


def test_each_replica_sees_its_own_devices_from_its_first_line(start_gw: StartGw) -> None:
    worker = start_gw("A100:3,L4", "-Q", "gpu.A100.single", replicas=3)
    expected = {f"replica-{number}": f"GPU-fake-{number}" for number in range(3)}
    assert eventually(lambda: found if (found := told(deviced.single, 9)) == expected else None)
    assert shown(worker) == {number: [f"GPU-fake-{number}"] for number in range(3)}


def test_a_family_is_served_with_as_many_devices_as_its_services_want(start_gw: StartGw) -> None:
    worker = start_gw("A100:5", "--gpu", "A100", replicas=2)
    assert shown(worker) == {0: ["GPU-fake-0", "GPU-fake-1"], 1: ["GPU-fake-2", "GPU-fake-3"]}
    assert consumed(worker) == ["gpu.A100.single", "gpu.A100x2.double"]
    (seen,) = set(told(deviced.double, 1).values())
    assert seen in ("GPU-fake-0,GPU-fake-1", "GPU-fake-2,GPU-fake-3")


def test_a_killed_child_is_followed_by_one_with_the_same_devices(start_gw: StartGw) -> None:
    worker = start_gw("A100:2", "-Q", "gpu.A100.single", replicas=2)
    before = eventually(lambda: found if len(found := pids(worker)) == 2 else None)
    os.kill(before[0], signal.SIGKILL)
    after = eventually(lambda: f if len(f := pids(worker)) == 2 and f[0] != before[0] else None, 20)
    assert after[1] == before[1]
    assert shown(worker) == {0: ["GPU-fake-0"], 1: ["GPU-fake-1"]}
    expected = {"replica-0": "GPU-fake-0", "replica-1": "GPU-fake-1"}
    assert eventually(lambda: told(deviced.single, 6) == expected)


def test_replicas_grow_onto_free_devices_and_no_further(start_gw: StartGw) -> None:
    worker = start_gw("A100:2", "-Q", "gpu.A100.single", "--replicas", "1", replicas=1)
    assert shown(worker) == {0: ["GPU-fake-0"]}
    control = deviced.celery.control
    given: dict[str, Any] = {"destination": [worker.node], "reply": True, "timeout": 5}
    (answer,) = control.pool_grow(4, **given)
    assert answer[worker.node]["error"].startswith("3 replicas were asked for, and 2 fit: each ")
    control.pool_grow(2, **given)
    eventually(lambda: shown(worker) == {0: ["GPU-fake-0"], 1: ["GPU-fake-1"]}, 20)


def test_a_replica_waits_for_the_devices_that_another_drains_on(start_gw: StartGw) -> None:
    worker = start_gw("A100:2", "-Q", "gpu.A100.single", replicas=2)
    before = eventually(lambda: found if len(found := pids(worker)) == 2 else None)
    calls = [deviced.single.delay(4.0) for _ in range(2)]
    eventually(lambda: [one["in_flight"] for one in listed(worker)] == [1, 1])
    given: dict[str, Any] = {"destination": [worker.node], "reply": True, "timeout": 5}
    deviced.celery.control.pool_shrink(2, **given)
    eventually(lambda: "draining" in [one["state"] for one in listed(worker)])
    deviced.celery.control.pool_grow(2, **given)
    after = eventually(lambda: f if len(f := pids(worker)) == 2 and f != before else None, 20)
    assert len(set(after.values()) & set(before.values())) == 1
    assert shown(worker) == {0: ["GPU-fake-0"], 1: ["GPU-fake-1"]}
    with allow_join_result():
        answers = {call.get(timeout=10)[0] for call in calls}
    assert answers == {"replica-0", "replica-1"}, "nothing in flight was cut off"


def test_two_workers_serve_the_two_kinds_of_one_machine(start_gw: StartGw) -> None:
    """Each takes the devices of its kind; small models share one."""
    large = start_gw("A100:2,L4", "--gpu", "A100", replicas=1)
    small = start_gw("A100:2,L4", "--gpu", "L4", replicas=2)
    assert shown(large) == {0: ["GPU-fake-0", "GPU-fake-1"]}
    assert shown(small) == {0: ["GPU-fake-2"], 1: ["GPU-fake-2"]}
    assert set(told(deviced.small, 4).values()) == {"GPU-fake-2"}


def test_one_worker_without_a_kind_takes_all_that_its_machine_can_serve(start_gw: StartGw) -> None:
    worker = start_gw("A100:2,L4", replicas=1)
    everything = ["GPU-fake-0", "GPU-fake-1", "GPU-fake-2"]
    assert sorted(*shown(worker).values()) == everything
    found = set(told(deviced.small, 1).values()) | set(told(deviced.anywhere, 1).values())
    assert {tuple(sorted(one.split(","))) for one in found} == {tuple(everything)}
    assert "cpu.on_cpu" not in consumed(worker)


def test_the_devices_are_those_that_the_worker_may_see(start_gw: StartGw) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "3,GPU-fake-1"}
    worker = start_gw("A100:4", "-Q", "gpu.A100.single", replicas=2, env=env)
    assert shown(worker) == {0: ["GPU-fake-3"], 1: ["GPU-fake-1"]}


@pytest.mark.parametrize("given", [None, "", "5"])
def test_a_service_for_the_cpu_sees_what_its_worker_was_given(
    start_gw: StartGw, given: str | None
) -> None:
    env = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    worker = start_gw("A100", "-Q", "cpu", replicas=1, env=env)
    assert shown(worker) == {0: []}
    assert told(deviced.on_cpu, 1) == {"replica-0": given}


def test_autoscale_counts_replicas(start_gw: StartGw) -> None:
    worker = start_gw("A100:3", "--gpu", "A100", "--autoscale", "1,1", replicas=1)
    scaler = pooling.ask(worker, "stats", deviced.celery)["autoscaler"]
    assert (scaler["max"], scaler["min"]) == (3, 3), "slots: two services and plain tasks"


@pytest.mark.parametrize(
    ("gpus", "arguments", "said"),
    [
        (
            "A100:3,L4",
            ["--gpu", "H100"],
            "--gpu H100: this machine has 3 x A100 (fake A100, 40 GB)",
        ),
        ("A100", ["--gpu", "A100", "--replicas", "2"], "2 replicas were asked for, and 1 fit"),
        ("A100", ["-Q", "gpu.A100x2"], "a replica needs 2 x A100 all to itself"),
        ("A100:many", [], "is not KIND[/GB][:COUNT]"),
    ],
)
def test_a_worker_that_lacks_its_devices_does_not_start(
    start_worker: StartWorker, gpus: str, arguments: list[str], said: str
) -> None:
    worker = start_worker(
        "deviced:celery",
        verb=["gw", "worker", *arguments],
        queues=None,
        env={"GW_FAKE_GPUS": gpus},
        wait_ready=False,
    )
    assert worker.wait_exit() == 78
    assert said in worker.log_text()


def test_celerys_own_command_gives_devices_to_the_replicas_of_our_pool(
    start_worker: StartWorker,
) -> None:
    env = {"GW_FAKE_GPUS": "A100:2", "SETTINGS": '{"worker_pool": "gw_celery.pool:TaskPool"}'}
    given: dict[str, Any] = {"concurrency": 4, "queues": "gpu.A100.single", "env": env}
    worker = start_worker("deviced:celery", **given)
    pooling.wait_loaded(worker, 2)
    assert shown(worker) == {0: ["GPU-fake-0"], 1: ["GPU-fake-1"]}
