from __future__ import annotations

import pytest

from gw_celery import errors
from gw_celery.declare import gpu
from gw_celery.gpus import devices

KNOWN = [kind for kind in gpu.KINDS if kind != "CPU"]


def device(index: int, token: str = "", **given: object) -> devices.Device:
    about = {"name": "NVIDIA L4", "memory_gb": 24.0, "kinds": ("L4",), **given}
    return devices.Device(index=index, token=token or f"GPU-{index}", **about)  # type: ignore[arg-type]


def visible(value: str | None, *there: devices.Device) -> list[str]:
    machine = devices.Machine(devices=there, source="NVML")
    return [seen.token for seen in devices.only_visible(machine, value).devices]


# -- kinds --


@pytest.mark.parametrize(
    ("name", "memory_gb", "kinds"),
    [
        ("NVIDIA A100-SXM4-40GB", 42.9, ["A100"]),
        ("NVIDIA A100-SXM4-80GB", 85.9, ["A100", "A100_80"]),
        ("NVIDIA A100 80GB PCIe", 85.9, ["A100", "A100_80"]),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 42.4, ["A100"]),
        ("NVIDIA H100 80GB HBM3", 85.5, ["H100"]),
        ("NVIDIA H100 NVL", 100.5, ["H100"]),
        ("NVIDIA H200", 150.8, ["H200"]),
        ("NVIDIA GH200 480GB", 102.0, []),
        ("Tesla T4", 16.1, ["T4"]),
        ("NVIDIA T400 4GB", 4.2, []),
        ("NVIDIA A10G", 24.1, ["A10G"]),
        ("NVIDIA A10", 24.1, []),
        ("NVIDIA L4", 24.2, ["L4"]),
        ("NVIDIA L40S", 48.3, ["L40S"]),
        ("NVIDIA L40", 48.3, []),
        ("NVIDIA GeForce RTX 4090", 25.8, []),
    ],
)
def test_a_product_is_of_the_kinds_that_its_name_and_memory_say(
    name: str, memory_gb: float, kinds: list[str]
) -> None:
    assert list(devices.kinds_of(name, memory_gb, KNOWN)) == kinds


@pytest.mark.parametrize("kind", ["RTX_4090", "RTX4090", "GEFORCE_RTX_4090"])
def test_a_kind_of_the_setting_is_named_by_words_that_stand_together(kind: str) -> None:
    assert devices.kinds_of("NVIDIA GeForce RTX 4090", 25.8, [*KNOWN, kind]) == (kind,)


def test_a_kind_that_ends_in_a_number_needs_about_that_memory() -> None:
    for memory_gb, kinds in ((96.0, ("H100", "H100_94")), (85.5, ("H100",)), (80.0, ("H100",))):
        assert devices.kinds_of("NVIDIA H100 NVL", memory_gb, [*KNOWN, "H100_94"]) == kinds


# -- what is visible --


FOUR = [device(0, "GPU-aa01"), device(1, "GPU-aa02"), device(2, "GPU-bb01"), device(3, "GPU-cc01")]


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (None, ["GPU-aa01", "GPU-aa02", "GPU-bb01", "GPU-cc01"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", ["GPU-bb01"]),
        ("3, 0", ["GPU-cc01", "GPU-aa01"]),
        ("1,-1,2", ["GPU-aa02"]),
        ("0,,2", ["GPU-aa01"]),
        ("GPU-bb01,1", ["GPU-bb01", "GPU-aa02"]),
        ("GPU-b", ["GPU-bb01"]),
        ("0,GPU-aa01", ["GPU-aa01"]),
    ],
)
def test_the_devices_of_the_worker_are_those_that_cuda_would_see(
    value: str | None, tokens: list[str]
) -> None:
    assert visible(value, *FOUR) == tokens


@pytest.mark.parametrize("value", ["4", "GPU-dd", "GPU-aa", "all", "0;1", "MIG-1"])
def test_what_names_no_device_or_several_is_an_error_with_those_that_are_there(value: str) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        visible(value, *FOUR)
    said = str(caught.value)
    assert f"CUDA_VISIBLE_DEVICES={value!r}" in said
    assert "GPU-aa01, GPU-aa02, GPU-bb01, GPU-cc01" in said


def test_a_whole_token_names_its_device_alone() -> None:
    there = [device(index, f"GPU-{index}") for index in range(12)]
    assert visible("GPU-1", *there) == ["GPU-1"]


def test_a_slice_is_named_by_its_uuid_and_a_gpu_stands_for_its_slices() -> None:
    cut = [device(0, f"MIG-{name}", slice_of="GPU-aa01") for name in ("11", "22")]
    there = [*cut, FOUR[2]]
    assert visible("MIG-22", *there) == ["MIG-22"]
    assert visible("MIG-2", *there) == ["MIG-22"]
    assert visible("0", *there) == ["MIG-11", "MIG-22"]
    assert visible("GPU-aa01", *there) == ["MIG-11", "MIG-22"]
    with pytest.raises(errors.ConfigurationError, match="'MIG-' names 2 devices"):
        visible("MIG-", *there)


def test_the_beginning_of_two_gpus_that_are_cut_names_neither() -> None:
    cut = [device(index, f"MIG-{index}", slice_of=f"GPU-aa0{index}") for index in (1, 2)]
    with pytest.raises(errors.ConfigurationError, match="'GPU-aa' names 2 devices"):
        visible("GPU-aa", *cut)


def test_an_error_says_which_variable_left_what() -> None:
    machine = devices.Machine(devices=(FOUR[0],), source="NVML")
    assert str(devices.only_visible(machine, "")) == (
        "no GPU; looked at NVML, CUDA_VISIBLE_DEVICES=''"
    )
    two = devices.Machine(devices=tuple(FOUR[:2]), source="NVML")
    assert str(two) == "2 x L4 (NVIDIA L4, 24 GB); looked at NVML"


# -- what a child is told --


def test_a_child_is_told_of_its_devices_by_their_uuids() -> None:
    assert devices.environment(FOUR[1:3]) == {"CUDA_VISIBLE_DEVICES": "GPU-aa02,GPU-bb01"}


def test_where_there_are_no_uuids_cuda_must_count_as_nvml_does() -> None:
    assert devices.environment([device(0, "0"), device(2, "2")]) == {
        "CUDA_VISIBLE_DEVICES": "0,2",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_a_child_without_devices_is_told_nothing() -> None:
    assert devices.environment([]) == {}
