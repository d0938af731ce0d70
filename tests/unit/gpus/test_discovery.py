from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from gw_celery import errors
from gw_celery.gpus import devices

KNOWN = ["T4", "L4", "A100", "A100_80"]


# -- GW_FAKE_GPUS --


@pytest.mark.parametrize(
    ("value", "made"),
    [
        ("A100:2", [("A100", 40.0)] * 2),
        ("A100:1, L4", [("A100", 40.0), ("L4", 24.0)]),
        ("A100/80:2", [("A100_80", 80.0)] * 2),
        ("A100_80", [("A100_80", 80.0)]),
        ("T4/7.5", [("T4", 7.5)]),
    ],
)
def test_fake_gpus_have_a_kind_a_memory_and_a_count(
    value: str, made: list[tuple[str, float]]
) -> None:
    machine = devices.fakes(value, KNOWN)
    assert [(device.kinds[-1], device.memory_gb) for device in machine.devices] == made
    tokens = [device.token for device in machine.devices]
    assert tokens == [f"GPU-fake-{number}" for number in range(len(made))]


@pytest.mark.parametrize(
    "value", ["4", "A100:0", "A100x2", "A100:", "A100/", "a100", "A100,", "H100", "A100:-1", "CPU"]
)
def test_a_wrong_value_is_an_error_that_says_what_to_write(value: str) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        devices.fakes(value, KNOWN)
    assert f"GW_FAKE_GPUS={value!r}" in str(caught.value)
    assert "KIND[/GB][:COUNT]" in str(caught.value)
    assert "KIND is one of T4, L4, A100, A100_80" in str(caught.value)


def test_a_kind_of_the_setting_must_say_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "B200")
    with pytest.raises(errors.ConfigurationError, match="say the GB of B200, over 0"):
        devices.find(("B200",))
    monkeypatch.setenv("GW_FAKE_GPUS", "B200/192")
    assert devices.find(("B200",)).has("B200")


def test_fake_gpus_stand_in_for_nvml_and_are_made_visible_as_real_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "L4:3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-fake-0")
    assert [device.index for device in devices.find().devices] == [2, 0]


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GW_FAKE_GPUS", "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "NVML" in devices.find().source


# -- NVML --


class NVMLError(Exception):
    """What the library raises for everything."""


class Nvml:
    """The library of a machine with these GPUs; a value that is an error is raised."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVMLError = NVMLError

    def __init__(self, *gpus: Mapping[str, Any], init: Exception | None = None) -> None:
        self.gpus = gpus
        self.init = init
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init is not None:
            raise self.init
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self.is_open
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return told(self.gpus[index], "handle", self.gpus[index])

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return str(told(handle, "name"))

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return str(told(handle, "uuid", NVMLError("Not Supported")))

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(total=told(handle, "memory", NVMLError("Not Supported")))

    def nvmlDeviceGetMigMode(self, handle: Any) -> Any:  # noqa: N802
        return (told(handle, "mig", NVMLError("Not Supported")), 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, number: int) -> Any:  # noqa: N802
        if number >= len(handle["slices"]):
            raise NVMLError("Not Found")
        return handle["slices"][number]


def told(handle: Mapping[str, Any], name: str, otherwise: Any = None) -> Any:
    value = handle.get(name, otherwise)
    if isinstance(value, Exception):
        raise value
    return value


def looked(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> devices.Machine:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine = devices.find()
    assert nvml is None or not nvml.is_open, "it was left open"
    return machine


A100 = {"name": "NVIDIA A100-SXM4-80GB", "uuid": "GPU-aa", "memory": 85899345920, "mig": 0}
T4 = {"name": "Tesla T4", "uuid": "GPU-bb", "memory": 16106127360}


def test_nvml_tells_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = looked(monkeypatch, Nvml(A100, T4))
    assert [(device.token, device.kinds, device.index) for device in machine.devices] == [
        ("GPU-aa", ("A100", "A100_80"), 0),
        ("GPU-bb", ("T4",), 1),
    ]
    assert [round(device.memory_gb, 1) for device in machine.devices] == [85.9, 16.1]
    assert machine.source == "NVML"


def test_a_device_without_uuid_and_memory_is_known_by_its_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (device,) = looked(monkeypatch, Nvml({"name": "NVIDIA L4"})).devices
    assert (device.token, device.memory_gb, device.kinds) == ("0", 0.0, ("L4",))


def test_of_a_gpu_that_is_cut_only_its_slices_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [
        {"name": "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "uuid": f"MIG-{number}", "memory": 42 * 10**9}
        for number in (1, 2)
    ]
    machine = looked(monkeypatch, Nvml(T4, {**A100, "mig": 1, "slices": slices}))
    assert [(device.token, device.index, device.slice_of) for device in machine.devices] == [
        ("GPU-bb", 0, ""),
        ("MIG-1", 1, "GPU-aa"),
        ("MIG-2", 1, "GPU-aa"),
    ]
    assert machine.devices[1].kinds == ("A100",)


def test_a_gpu_that_cannot_be_reached_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    machine = looked(monkeypatch, Nvml({"handle": NVMLError("GPU is lost")}, T4))
    assert [(device.token, device.index) for device in machine.devices] == [("GPU-bb", 1)]
    assert "GPU 0 is left out: NVML says GPU is lost" in caplog.text


@pytest.mark.parametrize(
    ("nvml", "source"),
    [
        (Nvml(init=NVMLError("Driver Not Loaded")), "NVML (Driver Not Loaded)"),
        (None, "pip install nvidia-ml-py"),
    ],
)
def test_a_machine_without_a_driver_has_no_gpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, nvml: Any, source: str
) -> None:
    machine = looked(monkeypatch, nvml)
    assert machine.devices == ()
    assert source in machine.source


def test_the_library_has_what_is_asked_of_it() -> None:
    pynvml = pytest.importorskip("pynvml")
    asked = [name for name in vars(Nvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in asked if not hasattr(pynvml, name)] == []
    assert pynvml.NVML_DEVICE_MIG_ENABLE == Nvml.NVML_DEVICE_MIG_ENABLE
