from __future__ import annotations

from collections.abc import Sequence

import pytest

import gw_celery as gw
from gw_celery import errors
from gw_celery.declare import gpu
from gw_celery.gpus import allocation, devices
from gw_celery.gpus.allocation import Need

KNOWN = [kind for kind in gpu.KINDS if kind != "CPU"]


def fakes(described: str) -> devices.Machine:
    return devices.fakes(described, KNOWN)


def numbers(described: str, *declared: gw.Gpu | None) -> list[list[int]]:
    """The devices of each replica that fits, by their numbers on the machine."""
    allotment = allocation.allot(allocation.needs_of(declared), fakes(described))
    return [[device.index for device in share] for share in allotment.shares]


# -- what a replica needs --


@pytest.mark.parametrize(
    ("declared", "needs"),
    [
        ([], []),
        ([None, gw.Gpu("CPU")], []),
        ([gw.Gpu("T4")], [Need(kind="T4")]),
        ([gw.Gpu("T4", 2), gw.Gpu("T4"), None], [Need(kind="T4", count=2)]),
        (
            [gw.Gpu("T4", memory_gb=4), gw.Gpu("T4", 2, memory_gb=6.5)],
            [Need(kind="T4", count=2, memory_gb=10.5)],
        ),
        ([gw.Gpu("T4", memory_gb=4), gw.Gpu("T4")], [Need(kind="T4")]),
        (
            [gw.Gpu("T4", memory_gb=4), gw.Gpu("L4", memory_gb=8)],
            [Need(kind="L4", memory_gb=8), Need(kind="T4", memory_gb=4)],
        ),
        ([gw.Gpu("A100", 2), gw.Gpu("A100_80")], [Need(kind="A100_80", count=2)]),
    ],
)
def test_a_replica_needs_the_largest_count_and_the_sum_of_the_memories(
    declared: Sequence[gw.Gpu | None], needs: list[Need]
) -> None:
    assert list(allocation.needs_of(declared)) == needs


# -- which devices each replica gets --


@pytest.mark.parametrize(
    ("described", "declared", "shares"),
    [
        ("A100:3", [gw.Gpu("A100")], [[0], [1], [2]]),
        ("A100:5", [gw.Gpu("A100", 2)], [[0, 1], [2, 3]]),
        ("L4:2,A100:2", [gw.Gpu("A100")], [[2], [3]]),
        ("A100:2,L4", [gw.Gpu("A100"), gw.Gpu("L4", memory_gb=12)], [[0, 2], [1, 2]]),
        ("A100/40,A100_80", [gw.Gpu("A100")], [[0], [1]]),
        ("A100,A100_80", [gw.Gpu("A100_80")], [[1]]),
    ],
)
def test_a_replica_owns_its_devices_alone(
    described: str, declared: list[gw.Gpu], shares: list[list[int]]
) -> None:
    assert numbers(described, *declared) == shares


def test_replicas_share_a_device_while_their_memories_fit() -> None:
    assert numbers("A100:2", gw.Gpu("A100", memory_gb=13)) == [[0], [1]] * 3
    assert numbers("A100", gw.Gpu("A100", memory_gb=40)) == [[0]]
    assert numbers("L4/0.3", gw.Gpu("L4", memory_gb=0.1)) == [[0]] * 3


def test_the_device_with_most_room_is_next() -> None:
    assert numbers("A100/20,A100_80", gw.Gpu("A100", memory_gb=20)) == [[1], [1], [1], [0], [1]]


def test_the_devices_of_one_replica_are_different_ones() -> None:
    shares = numbers("A100:3", gw.Gpu("A100", 2, memory_gb=20))
    assert shares == [[0, 1], [0, 2], [1, 2]]


def test_one_service_without_its_memory_makes_the_replica_own_its_devices() -> None:
    assert numbers("A100", gw.Gpu("A100", memory_gb=1), gw.Gpu("A100")) == [[0]]


def test_one_replica_gets_one_slice_of_a_gpu_at_most() -> None:
    cut = devices.Machine(
        devices=tuple(
            devices.Device(
                name="NVIDIA A100-SXM4-40GB MIG 1g.5gb",
                token=f"MIG-{number}",
                memory_gb=5.0,
                index=0,
                kinds=("A100",),
                slice_of="GPU-0",
            )
            for number in range(3)
        ),
        source="NVML",
    )
    assert allocation.allot([Need(kind="A100")], cut).most == 3
    with pytest.raises(errors.ConfigurationError, match="2 x A100 all to itself"):
        allocation.allot([Need(kind="A100", count=2)], cut)


def test_a_device_of_two_kinds_is_not_given_twice() -> None:
    ada = {"name": "NVIDIA RTX 6000 Ada Generation", "memory_gb": 51.5, "kinds": ("ADA", "RTX")}
    two = [devices.Device(token=f"GPU-{index}", index=index, **ada) for index in range(2)]  # type: ignore[arg-type]
    there = devices.Machine(devices=tuple(two), source="NVML")
    with pytest.raises(errors.ConfigurationError, match="1 x RTX all to itself and 1 x ADA"):
        allocation.allot([Need(kind="RTX"), Need(kind="ADA")], there)


def test_a_tiny_memory_makes_no_millions_of_replicas() -> None:
    assert len(numbers("A100:8", gw.Gpu("A100", memory_gb=1e-6))) == 1024


@pytest.mark.parametrize(
    ("described", "declared", "said"),
    [
        ("L4:2", gw.Gpu("A100"), ["needs 1 x A100 all to itself", "2 x L4", "GW_FAKE_GPUS=A100:1"]),
        ("A100", gw.Gpu("A100", 2), ["2 x A100 all to itself", "has 1 x A100 (fake A100, 40 GB)"]),
        ("A100", gw.Gpu("A100", memory_gb=41), ["1 x A100 with 41 GB on each", "40 GB"]),
    ],
)
def test_a_machine_without_room_for_one_replica_is_refused_with_what_it_has(
    described: str, declared: gw.Gpu, said: list[str]
) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        numbers(described, declared)
    for words in (*said, f"looked at GW_FAKE_GPUS='{described}'"):
        assert words in str(caught.value)


def test_more_replicas_than_fit_are_refused_with_what_was_asked_and_what_there_is() -> None:
    allotment = allocation.allot(allocation.needs_of([gw.Gpu("A100", 2)]), fakes("A100:5"))
    assert allotment.refusal(2) is None
    assert allotment.refusal(3) == (
        "3 replicas were asked for, and 2 fit: each needs 2 x A100 all to itself, and this machine "
        "has 5 x A100 (fake A100, 40 GB); looked at GW_FAKE_GPUS='A100:5'"
    )


# -- which families a machine can serve --


DECLARED: dict[str, list[gw.Gpu | None]] = {
    "gpu": [None],
    "cpu": [gw.Gpu("CPU")],
    "gpu.A100": [gw.Gpu("A100"), gw.Gpu("A100", memory_gb=10)],
    "gpu.A100x2": [gw.Gpu("A100", 2)],
    "gpu.L4": [gw.Gpu("L4", memory_gb=30)],
    "gpu.T4": [gw.Gpu("T4")],
}
NONE = devices.Machine(devices=(), source="NVML")


def families(kind: str | None, described: str = "", but: str = "") -> list[str]:
    declared = {name: gpus for name, gpus in DECLARED.items() if name not in but.split()}
    return allocation.families_for(kind, declared, fakes(described) if described else NONE)


@pytest.mark.parametrize(
    ("kind", "described", "taken"),
    [
        ("A100", "A100", ["gpu.A100"]),
        ("A100", "A100:2,T4", ["gpu.A100", "gpu.A100x2"]),
        ("A100", "A100_80:2", ["gpu.A100", "gpu.A100x2"]),
        ("T4", "A100:2,T4", ["gpu.T4"]),
        ("CPU", "A100:2", ["cpu"]),
        ("CPU", "", ["cpu"]),
        (None, "A100,T4", ["gpu", "gpu.A100", "gpu.T4"]),
        (None, "L4", ["gpu"]),
        (None, "", ["cpu"]),
    ],
)
def test_a_worker_takes_the_families_that_its_machine_can_serve(
    kind: str | None, described: str, taken: list[str]
) -> None:
    assert families(kind, described) == taken


def test_a_machine_whose_gpus_serve_nothing_serves_the_cpu() -> None:
    assert families(None, "H100", but="gpu") == ["cpu"]


@pytest.mark.parametrize(
    ("kind", "described", "but", "said"),
    [
        ("A100", "T4", "", "--gpu A100: this machine has 1 x T4"),
        ("A100", "", "", "--gpu A100: this machine has no GPU; looked at NVML; to run"),
        ("H100", "H100", "", "--gpu H100: no service here can be served; families: cpu, gpu, "),
        ("L4", "L4", "", "--gpu L4: no service here can be served"),
        ("CPU", "", "cpu", "--gpu CPU: no service here can be served"),
        (
            None,
            "",
            "cpu",
            "here can be served; families: gpu, gpu.A100 (needs 1 x A100 all to itself",
        ),
        (None, "", "cpu", '; what needs no GPU declares gpu=gw.Gpu("CPU")'),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_there_is(
    kind: str | None, described: str, but: str, said: str
) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        families(kind, described, but)
    assert said in str(caught.value)


def test_a_service_that_needs_more_memory_than_there_is_says_how_much() -> None:
    declared = {"gpu.A100": [gw.Gpu("A100", memory_gb=60)]}
    with pytest.raises(errors.ConfigurationError, match="A100 with 60 GB on each"):
        allocation.families_for("A100", declared, fakes("A100:4"))
    with pytest.raises(errors.ConfigurationError, match="GW_FAKE_GPUS=A100/60:1"):
        allocation.allot(allocation.needs_of(declared["gpu.A100"]), fakes("A100:4"))


def test_devices_that_a_variable_hides_are_not_to_be_faked() -> None:
    hidden = devices.only_visible(fakes("A100:4"), "")
    with pytest.raises(errors.ConfigurationError, match="CUDA_VISIBLE_DEVICES hides devices"):
        allocation.families_for("A100", {}, hidden)


def test_the_remedy_for_a_kind_of_the_setting_works() -> None:
    with pytest.raises(errors.ConfigurationError, match="GW_FAKE_GPUS=RTX_4090/24:1"):
        allocation.families_for("RTX_4090", {}, NONE)
    assert devices.fakes("RTX_4090/24:1", ["RTX_4090"]).devices
