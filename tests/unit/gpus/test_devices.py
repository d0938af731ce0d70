"""The devices that a worker finds: what NVML and ``GW_FAKE_GPUS`` say, and which are visible."""

from __future__ import annotations

from typing import Any

import pytest

import gw_celery as gw
from tests.gpu_workers import GpuWorkers, Nvml, NVMLError

KINDS = ["T4", "L4", "A10G", "L40S", "A100", "A100_80", "H100", "H200"]


def found(gpu_worker: GpuWorkers, machine: str | Nvml | None, **given: Any) -> str:
    """What a worker says that this machine has, and where it looked."""
    worker = gpu_worker("--gpu B300", [None], machine, gpu_kinds=["B300"], **given)
    assert worker.is_refused
    _, _, rest = worker.said.partition("--gpu B300: this machine has ")
    return rest.partition("; to run")[0].partition("; CUDA_VISIBLE_DEVICES hides")[0].strip()


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
    gpu_worker: GpuWorkers, name: str, memory_gb: float, kinds: list[str]
) -> None:
    machine = Nvml({"name": name, "uuid": "GPU-0", "memory": memory_gb * 10**9})
    worker = gpu_worker("", [gw.Gpu("CPU"), *map(gw.Gpu, KINDS)], machine)
    assert worker.families == [f"gpu.{kind}" for kind in kinds] or ["cpu"]


@pytest.mark.parametrize("kind", ["RTX_4090", "RTX4090", "GEFORCE_RTX_4090"])
def test_a_kind_of_the_setting_is_named_by_words_that_stand_together(
    gpu_worker: GpuWorkers, kind: str
) -> None:
    machine = Nvml({"name": "NVIDIA GeForce RTX 4090", "uuid": "GPU-0", "memory": 25_800_000_000})
    assert gpu_worker("", [gw.Gpu(kind)], machine, gpu_kinds=[kind]).families == [f"gpu.{kind}"]


@pytest.mark.parametrize(
    ("memory_gb", "kinds"), [(96.0, ["H100", "H100_94"]), (85.5, ["H100"]), (80.0, ["H100"])]
)
def test_a_kind_that_ends_in_a_number_needs_about_that_memory(
    gpu_worker: GpuWorkers, memory_gb: float, kinds: list[str]
) -> None:
    machine = Nvml({"name": "NVIDIA H100 NVL", "uuid": "GPU-0", "memory": memory_gb * 10**9})
    worker = gpu_worker("", [gw.Gpu("H100"), gw.Gpu("H100_94")], machine, gpu_kinds=["H100_94"])
    assert worker.families == [f"gpu.{kind}" for kind in kinds]


# -- what is visible --


def l4(token: str, **given: Any) -> dict[str, Any]:
    return {"name": "NVIDIA L4", "memory": 24_000_000_000, "uuid": token, **given}


FOUR = Nvml(*map(l4, ("GPU-aa01", "GPU-aa02", "GPU-bb01", "GPU-cc01")))


def visible(gpu_worker: GpuWorkers, value: str | None, machine: Nvml = FOUR) -> list[str]:
    """The devices of a worker's replicas, one each."""
    worker = gpu_worker("-Q gpu.L4", [gw.Gpu("L4")], machine, visible=value)
    if worker.is_refused:
        assert "this machine has no GPU" in worker.said
        return []
    return [token for tokens in worker.replicas for token in tokens]


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
    gpu_worker: GpuWorkers, value: str | None, tokens: list[str]
) -> None:
    assert visible(gpu_worker, value) == tokens


@pytest.mark.parametrize("value", ["4", "GPU-dd", "GPU-aa", "all", "0;1", "MIG-1"])
def test_what_names_no_device_or_several_is_an_error_with_those_that_are_there(
    gpu_worker: GpuWorkers, value: str
) -> None:
    worker = gpu_worker("", [gw.Gpu("L4")], FOUR, visible=value)
    assert worker.is_refused
    assert f"CUDA_VISIBLE_DEVICES={value!r}" in worker.said
    assert "GPU-aa01, GPU-aa02, GPU-bb01, GPU-cc01" in worker.said


def test_a_whole_token_names_its_device_alone(gpu_worker: GpuWorkers) -> None:
    machine = Nvml(*(l4(f"GPU-{index}") for index in range(12)))
    assert visible(gpu_worker, "GPU-1", machine) == ["GPU-1"]


def test_a_slice_is_named_by_its_uuid_and_a_gpu_stands_for_its_slices(
    gpu_worker: GpuWorkers,
) -> None:
    slices = [l4(f"MIG-{name}") for name in ("11", "22")]
    machine = Nvml(l4("GPU-aa01", mig=1, slices=slices), l4("GPU-bb01"))
    assert visible(gpu_worker, "MIG-22", machine) == ["MIG-22"]
    assert visible(gpu_worker, "MIG-2", machine) == ["MIG-22"]
    assert visible(gpu_worker, "0", machine) == ["MIG-11", "MIG-22"]
    assert visible(gpu_worker, "GPU-aa01", machine) == ["MIG-11", "MIG-22"]
    worker = gpu_worker("", [gw.Gpu("L4")], machine, visible="MIG-")
    assert "'MIG-' names 2 devices" in worker.said


def test_the_beginning_of_two_gpus_that_are_cut_names_neither(gpu_worker: GpuWorkers) -> None:
    cut = (l4(f"GPU-aa0{index}", mig=1, slices=[l4(f"MIG-{index}")]) for index in (1, 2))
    worker = gpu_worker("", [gw.Gpu("L4")], Nvml(*cut), visible="GPU-aa")
    assert worker.is_refused
    assert "'GPU-aa' names 2 devices" in worker.said


def test_an_error_says_which_variable_left_what(gpu_worker: GpuWorkers) -> None:
    assert found(gpu_worker, Nvml(l4("GPU-0")), visible="") == (
        "no GPU; looked at NVML, CUDA_VISIBLE_DEVICES=''"
    )
    assert found(gpu_worker, Nvml(l4("GPU-0"), l4("GPU-1"))) == (
        "2 x L4 (NVIDIA L4, 24 GB); looked at NVML"
    )


def test_where_there_are_no_uuids_cuda_must_count_as_nvml_does(gpu_worker: GpuWorkers) -> None:
    machine = Nvml({"name": "NVIDIA L4"}, {"name": "Tesla T4"}, {"name": "NVIDIA L4"})
    (seen,) = gpu_worker("-Q gpu.L4x2", [gw.Gpu("L4", 2)], machine).environments()
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["CUDA_DEVICE_ORDER"]) == ("0,2", "PCI_BUS_ID")
    (named,) = gpu_worker("-Q gpu.L4", [gw.Gpu("L4")], Nvml(l4("GPU-0"))).environments()
    assert "CUDA_DEVICE_ORDER" not in named


# -- GW_FAKE_GPUS --


@pytest.mark.parametrize(
    ("value", "made"),
    [
        ("A100:2", "2 x A100 (fake A100, 40 GB)"),
        ("A100:1, L4", "1 x A100 (fake A100, 40 GB), 1 x L4 (fake L4, 24 GB)"),
        ("A100/80:2", "2 x A100_80 (fake A100, 80 GB)"),
        ("A100_80", "1 x A100_80 (fake A100_80, 80 GB)"),
        ("T4/7.5", "1 x T4 (fake T4, 7.5 GB)"),
    ],
)
def test_fake_gpus_have_a_kind_a_memory_and_a_count(
    gpu_worker: GpuWorkers, value: str, made: str
) -> None:
    assert found(gpu_worker, value) == f"{made}; looked at GW_FAKE_GPUS={value!r}"


@pytest.mark.parametrize(
    "value", ["4", "A100:0", "A100x2", "A100:", "A100/", "a100", "A100,", "B300", "A100:-1", "CPU"]
)
def test_a_wrong_value_is_an_error_that_says_what_to_write(
    gpu_worker: GpuWorkers, value: str
) -> None:
    worker = gpu_worker("", [gw.Gpu("A100")], value)
    assert worker.is_refused
    assert f"GW_FAKE_GPUS={value!r}" in worker.said
    assert "KIND[/GB][:COUNT]" in worker.said
    assert "KIND is one of T4, " in worker.said


def test_a_kind_of_the_setting_must_say_its_memory(gpu_worker: GpuWorkers) -> None:
    given: dict[str, Any] = {"declared": [gw.Gpu("B200")], "gpu_kinds": ["B200"]}
    worker = gpu_worker("", machine="B200", **given)
    assert worker.is_refused
    assert "say the GB of B200, over 0" in worker.said
    assert gpu_worker("", machine="B200/192", **given).families == ["gpu.B200"]


def test_fake_gpus_stand_in_for_nvml_and_are_made_visible_as_real_ones(
    gpu_worker: GpuWorkers,
) -> None:
    worker = gpu_worker("", [gw.Gpu("L4")], "L4:3", visible="2,GPU-fake-0")
    assert worker.replicas == [["GPU-fake-2"], ["GPU-fake-0"]]


def test_an_empty_variable_is_as_good_as_none(gpu_worker: GpuWorkers) -> None:
    assert "looked at NVML" in found(gpu_worker, "")


# -- NVML --


A100 = {"name": "NVIDIA A100-SXM4-80GB", "uuid": "GPU-aa", "memory": 85899345920, "mig": 0}
T4 = {"name": "Tesla T4", "uuid": "GPU-bb", "memory": 16106127360}


def test_nvml_tells_what_there_is(gpu_worker: GpuWorkers) -> None:
    machine = Nvml(A100, T4)
    assert found(gpu_worker, machine) == (
        "1 x A100_80 (NVIDIA A100-SXM4-80GB, 85.9 GB), 1 x T4 (Tesla T4, 16.1 GB); looked at NVML"
    )
    assert not machine.is_open, "it was left open"
    both = [gw.Gpu("A100"), gw.Gpu("T4")]
    assert gpu_worker("", both, machine).replicas == [["GPU-aa", "GPU-bb"]]


def test_a_device_without_uuid_and_memory_is_known_by_its_index(gpu_worker: GpuWorkers) -> None:
    machine = Nvml({"name": "NVIDIA L4"})
    assert found(gpu_worker, machine) == "1 x L4 (NVIDIA L4, 0 GB); looked at NVML"
    assert gpu_worker("", [gw.Gpu("L4")], machine).replicas == [["0"]]


def test_of_a_gpu_that_is_cut_only_its_slices_can_be_used(gpu_worker: GpuWorkers) -> None:
    slices = [
        {"name": "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "uuid": f"MIG-{number}", "memory": 42 * 10**9}
        for number in (1, 2)
    ]
    machine = Nvml(T4, {**A100, "mig": 1, "slices": slices})
    assert found(gpu_worker, machine) == (
        "1 x T4 (Tesla T4, 16.1 GB), 2 x A100 (NVIDIA A100-SXM4-80GB MIG 3g.40gb, 42 GB); "
        "looked at NVML"
    )
    assert gpu_worker("-Q gpu.A100", [gw.Gpu("A100")], machine).replicas == [["MIG-1"], ["MIG-2"]]


def test_a_gpu_that_cannot_be_reached_is_left_out_and_said(gpu_worker: GpuWorkers) -> None:
    worker = gpu_worker("", [gw.Gpu("T4")], Nvml({"handle": NVMLError("GPU is lost")}, T4))
    assert "GPU 0 is left out: NVML says GPU is lost" in worker.said
    assert worker.replicas == [["GPU-bb"]]


@pytest.mark.parametrize(
    ("machine", "source"),
    [
        (Nvml(init=NVMLError("Driver Not Loaded")), "looked at NVML (Driver Not Loaded)"),
        (None, "pip install nvidia-ml-py"),
    ],
)
def test_a_machine_without_a_driver_has_no_gpu_and_says_why(
    gpu_worker: GpuWorkers, machine: Nvml | None, source: str
) -> None:
    said = found(gpu_worker, machine)
    assert said.startswith("no GPU; looked at NVML")
    assert source in said


def test_the_library_has_what_is_asked_of_it() -> None:
    pynvml = pytest.importorskip("pynvml")
    asked = [name for name in vars(Nvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in asked if not hasattr(pynvml, name)] == []
    assert pynvml.NVML_DEVICE_MIG_ENABLE == Nvml.NVML_DEVICE_MIG_ENABLE
