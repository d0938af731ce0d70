"""Finds the GPUs that a worker may use, with NVML or simulated, in the worker's parent."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gw_celery import conf, errors
from gw_celery.declare import gpu

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"

#: Memory of a device per GB in the name of its kind: product names count in 10**9 or 2**30 bytes,
#: and the driver reserves some.
_LEAST, _MOST = 0.95, 1.08
#: Entries that end the list of visible devices, as in CUDA.
_END = re.compile(r"|-\d+|NoDevFiles")
#: Memory of simulated devices without a given size, in GB.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or a MIG slice of one."""

    #: Product name, from NVML.
    name: str
    #: Its entry in ``CUDA_VISIBLE_DEVICES``: the UUID, or the index if NVML has no UUID.
    token: str
    #: In units of 10**9 bytes, as in product names.
    memory_gb: float
    #: Index of the GPU, in the order of ``nvidia-smi``.
    index: int
    #: All kinds that it belongs to: an A100 of 80 GB is ``A100`` and ``A100_80``.
    kinds: tuple[str, ...] = ()
    #: UUID of the GPU of this slice; CUDA gives a process only one slice.
    slice_of: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_gb:.3g} GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices that a worker may use."""

    devices: tuple[Device, ...]
    #: Where they were found, for error messages.
    source: str

    def __str__(self) -> str:
        counted = collections.Counter(
            f"{device.kinds[-1] if device.kinds else 'of no known kind'} ({device})"
            for device in self.devices
        )
        listed = ", ".join(f"{count} x {name}" for name, count in counted.items())
        return f"{listed or 'no GPU'}; looked at {self.source}"


#: The machine of a worker that needs no device.
NONE = Machine(devices=(), source="nothing")


def find(added: Collection[str] = ()) -> Machine:
    """Return the devices that this process may use; empty without an NVIDIA driver.

    Args:
        added: the kinds of ``gw_gpu_kinds``.

    Raises:
        ConfigurationError: if ``GW_FAKE_GPUS`` or ``CUDA_VISIBLE_DEVICES`` is invalid.
    """
    kinds = [kind for kind in (*gpu.KINDS, *added) if kind != "CPU"]
    value = conf.fake_gpus()
    machine = _from_nvml(kinds) if value is None else fakes(value, kinds)
    return only_visible(machine, conf.visible_devices())


def fakes(value: str, kinds: Collection[str]) -> Machine:
    """Return the machine that ``GW_FAKE_GPUS`` describes.

    Args:
        value: ``KIND[/GB][:COUNT]``, separated by commas: ``A100:2,L4`` or ``A100/80:4``.
        kinds: the kinds that it may name.

    Raises:
        ConfigurationError: if ``value`` is invalid.
    """
    fake_gpus: list[Device] = []
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
                Device(
                    name=f"fake {kind}",
                    token=f"GPU-fake-{len(fake_gpus)}",
                    memory_gb=size,
                    index=len(fake_gpus),
                    kinds=kinds_of(kind, size, kinds),
                )
            )
    return Machine(devices=tuple(fake_gpus), source=f"GW_FAKE_GPUS={value!r}")


def _wrong(value: str, part: str, rule: str) -> errors.ConfigurationError:
    return errors.ConfigurationError(
        f"GW_FAKE_GPUS={value!r}: {part!r} is not KIND[/GB][:COUNT], such as A100:4, A100/80:4 or, "
        f"for two kinds, A100:2,L4; {rule}"
    )


def _from_nvml(kinds: Collection[str]) -> Machine:
    try:
        # Imported late, because only workers that serve GPU services need it.
        import pynvml
    except ImportError as exc:
        return Machine(devices=(), source=f"NVML ({exc}: pip install nvidia-ml-py)")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        return Machine(devices=(), source=f"NVML ({exc})")
    try:
        return Machine(devices=tuple(_devices(pynvml, kinds)), source="NVML")
    finally:
        pynvml.nvmlShutdown()


def _devices(nvml: Any, kinds: Collection[str]) -> Iterator[Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            whole = _device(nvml, handle, index, kinds)
            if not _is_cut(nvml, handle):
                yield whole
                continue
            for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                with contextlib.suppress(nvml.NVMLError):  # no slice of this number
                    part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                    yield _device(nvml, part, index, kinds, whole.token)
        except nvml.NVMLError as exc:  # unreachable, or without permission
            logger.warning("GPU %d is left out: NVML says %s; see nvidia-smi", index, exc)


def _device(
    nvml: Any, handle: Any, index: int, kinds: Collection[str], slice_of: str = ""
) -> Device:
    name, size, token = nvml.nvmlDeviceGetName(handle), 0.0, str(index)
    with contextlib.suppress(nvml.NVMLError):  # devices without memory of their own
        size = nvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
    with contextlib.suppress(nvml.NVMLError):
        token = nvml.nvmlDeviceGetUUID(handle)
    kinds = kinds_of(name, size, kinds)
    return Device(
        name=name, token=token, memory_gb=size, index=index, kinds=kinds, slice_of=slice_of
    )


def _is_cut(nvml: Any, handle: Any) -> bool:
    """Return whether a GPU is in MIG mode, in which only its slices can be used."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a GPU without MIG
        return False
    return bool(mode == nvml.NVML_DEVICE_MIG_ENABLE)


def kinds_of(name: str, memory_gb: float, candidates: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of a product, the most general first.

    A kind is made of consecutive words of the product name: ``RTX_4090`` or ``RTX4090`` matches
    "NVIDIA GeForce RTX 4090". A kind that ends in a number, such as ``A100_80``, is an ``A100``
    with about that many GB.

    Args:
        name: product name, from NVML.
        memory_gb: its memory, in units of 10**9 bytes.
        candidates: the kinds to choose from.
    """
    words = re.findall(r"[A-Z0-9]+", name.upper())
    ends = range(1, len(words) + 1)
    runs = {"".join(words[start:end]) for end in ends for start in range(end)}
    kinds = []
    for kind in candidates:
        base, _, size = kind.rpartition("_")
        is_sized = size.isdecimal() and _LEAST * int(size) <= memory_gb <= _MOST * int(size)
        if kind.replace("_", "") in runs or (is_sized and base.replace("_", "") in runs):
            kinds.append(kind)
    return tuple(sorted(kinds, key=len))


def only_visible(machine: Machine, value: str | None) -> Machine:
    """Return ``machine`` with the devices that ``CUDA_VISIBLE_DEVICES`` names, in that order.

    Args:
        machine: all devices.
        value: the variable: indexes, UUIDs or beginnings of UUIDs; ``None`` if it is not set. A GPU
            in MIG mode stands for all its slices.

    Raises:
        ConfigurationError: if an entry names no device, or several.
    """
    if value is None:
        return machine
    visible: list[Device] = []
    for token in map(str.strip, value.split(",")):
        if _END.fullmatch(token):
            break
        visible += [device for device in _named(token, machine, value) if device not in visible]
    return Machine(devices=tuple(visible), source=f"{machine.source}, {VISIBLE}={value!r}")


def environment(devices: Sequence[Device]) -> Mapping[str, str]:
    """Return the variables that make a process see only these devices; empty for no device."""
    if not devices:
        return {}
    variables = {VISIBLE: ",".join(device.token for device in devices)}
    if all(device.token.isdecimal() for device in devices):
        # Otherwise CUDA counts the fastest device first, unlike NVML.
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return variables


def _named(token: str, machine: Machine, value: str) -> list[Device]:
    there = machine.devices
    if token.isdecimal():
        named = [device for device in there if device.index == int(token)]
    else:
        named = [device for device in there if device.token == token]
        named = named or [device for device in there if device.token.startswith(token)]
        named = named or [device for device in there if device.slice_of.startswith(token)]
    are_of_one_gpu = len({device.index for device in named}) == 1
    # A GPU stands for all its slices, but the beginning of a slice's UUID must be unique.
    if not are_of_one_gpu or (len(named) > 1 and named[0].token.startswith(token)):
        raise errors.ConfigurationError(
            f"{VISIBLE}={value!r}: {token!r} names {len(named) or 'no'} devices; there are "
            f"{', '.join(device.token for device in there) or 'none'}, "
            f"or count them from 0 in the order of nvidia-smi ({machine})"
        )
    return named
