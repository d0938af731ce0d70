"""Finds the GPUs of this machine: from NVML, or from ``GW_FAKE_GPUS`` in its place."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from gw_celery import conf, errors
from gw_celery.declare import gpu
from gw_celery.gpus import devices

logger = logging.getLogger(__name__)

#: The memory of fake devices without a size, in GB.
_SIZES = {
    "T4": 16.0,
    "A10G": 24.0,
    "L4": 24.0,
    "L40S": 48.0,
    "A100": 40.0,
    "A100_80": 80.0,
    "H100": 80.0,
    "H200": 141.0,
}
_FAKE = re.compile(r"(?P<kind>[A-Z][A-Z0-9_]*)(/(?P<size>\d+(\.\d+)?))?(:(?P<count>[1-9]\d{0,2}))?")


def find(added: Collection[str] = ()) -> devices.Machine:
    """Return the devices that this process may use; none where there is no NVIDIA driver.

    Args:
        added: the kinds of ``gw_gpu_kinds``.

    Raises:
        ConfigurationError: for a ``GW_FAKE_GPUS`` or ``CUDA_VISIBLE_DEVICES`` that means nothing.
    """
    kinds = [kind for kind in (*gpu.KINDS, *added) if kind != "CPU"]
    value = conf.fake_gpus()
    machine = _from_nvml(kinds) if value is None else fakes(value, kinds)
    return devices.only_visible(machine, conf.visible_devices())


def fakes(value: str, kinds: Collection[str]) -> devices.Machine:
    """Return the machine that ``GW_FAKE_GPUS`` describes.

    Args:
        value: ``KIND[/GB][:COUNT]``, and more after commas: ``A100:2,L4`` or ``A100/80:4``.
        kinds: the kinds that it may name.

    Raises:
        ConfigurationError: for anything else.
    """
    fake_gpus: list[devices.Device] = []
    for part in map(str.strip, value.split(",")):
        matched = _FAKE.fullmatch(part)
        if matched is None or matched["kind"] not in kinds:
            raise _wrong(value, part, f"KIND is one of {', '.join(kinds)}")
        kind = matched["kind"]
        size = float(matched["size"] or _SIZES.get(kind, 0.0))
        if not size:
            raise _wrong(value, part, f"say the GB of {kind}, over 0")
        for _ in range(int(matched["count"] or 1)):
            fake_gpus.append(
                devices.Device(
                    name=f"fake {kind}",
                    token=f"GPU-fake-{len(fake_gpus)}",
                    memory_gb=size,
                    index=len(fake_gpus),
                    kinds=devices.kinds_of(kind, size, kinds),
                )
            )
    return devices.Machine(devices=tuple(fake_gpus), source=f"GW_FAKE_GPUS={value!r}")


def _wrong(value: str, part: str, rule: str) -> errors.ConfigurationError:
    return errors.ConfigurationError(
        f"GW_FAKE_GPUS={value!r}: {part!r} is not KIND[/GB][:COUNT], such as A100:4, A100/80:4 or, "
        f"for two kinds, A100:2,L4; {rule}"
    )


def _from_nvml(kinds: Collection[str]) -> devices.Machine:
    try:
        # Here, because only workers that serve GPU services need it.
        import pynvml
    except ImportError as exc:
        return devices.Machine(devices=(), source=f"NVML ({exc}: pip install nvidia-ml-py)")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        return devices.Machine(devices=(), source=f"NVML ({exc})")
    try:
        return devices.Machine(devices=tuple(_devices(pynvml, kinds)), source="NVML")
    finally:
        pynvml.nvmlShutdown()


def _devices(nvml: Any, kinds: Collection[str]) -> Iterator[devices.Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            whole = _device(nvml, handle, index, kinds)
            slices = _slices(nvml, handle, whole, kinds)
        except nvml.NVMLError as exc:  # fallen off the bus, or not ours to see
            logger.warning("GPU %d is left out: NVML says %s", index, exc)
            continue
        yield from slices if slices is not None else [whole]


def _device(
    nvml: Any, handle: Any, index: int, kinds: Collection[str], slice_of: str = ""
) -> devices.Device:
    name, size, token = nvml.nvmlDeviceGetName(handle), 0.0, str(index)
    with contextlib.suppress(nvml.NVMLError):  # devices that share the memory of the machine
        size = nvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
    with contextlib.suppress(nvml.NVMLError):
        token = nvml.nvmlDeviceGetUUID(handle)
    return devices.Device(
        name=name,
        token=token,
        memory_gb=size,
        index=index,
        kinds=devices.kinds_of(name, size, kinds),
        slice_of=slice_of,
    )


def _slices(
    nvml: Any, handle: Any, whole: devices.Device, kinds: Collection[str]
) -> Sequence[devices.Device] | None:
    """Return the slices of a GPU in MIG mode, of which nothing else can be used; else ``None``."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a GPU that has no such mode
        return None
    if mode != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    slices: list[devices.Device] = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):  # no slice of this number
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            slices.append(_device(nvml, part, whole.index, kinds, whole.token))
    return slices
