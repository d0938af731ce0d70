"""The GPUs of a machine: found with NVML, or faked, and those of them that a worker may use."""

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

#: The memory of a device, for each GB in the name of its kind: product names count in 10**9 or in
#: 2**30 bytes, and the driver keeps some.
_LEAST, _MOST = 0.95, 1.08
#: Entries that end the list of visible devices, as they do for CUDA.
_END = re.compile(r"|-\d+|NoDevFiles")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or one MIG slice of a GPU."""

    #: The product, as NVML names it.
    name: str
    #: Its name in ``CUDA_VISIBLE_DEVICES``: the UUID, or the index where NVML gives none.
    token: str
    #: In units of 10**9 bytes, which product names count in.
    memory_gb: float
    #: Of the GPU, in the order of ``nvidia-smi``.
    index: int
    #: Every kind that it is: an A100 of 80 GB is ``A100`` and ``A100_80``.
    kinds: tuple[str, ...] = ()
    #: The UUID of the GPU that this is a slice of; CUDA gives a process one slice only.
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
    """Return the devices that this process may use; none where there is no NVIDIA driver.

    Args:
        added: the kinds of ``gw_gpu_kinds``.

    Raises:
        ConfigurationError: for a ``GW_FAKE_GPUS`` or ``CUDA_VISIBLE_DEVICES`` that means nothing.
    """
    kinds = [kind for kind in (*gpu.KINDS, *added) if kind != "CPU"]
    value = conf.fake_gpus()
    machine = _from_nvml(kinds) if value is None else fakes(value, kinds)
    return only_visible(machine, conf.visible_devices())


def fakes(value: str, kinds: Collection[str]) -> Machine:
    """Return the machine that ``GW_FAKE_GPUS`` describes.

    Args:
        value: ``KIND[/GB][:COUNT]``, and more after commas: ``A100:2,L4`` or ``A100/80:4``.
        kinds: the kinds that it may name.

    Raises:
        ConfigurationError: for anything else.
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
        # Here, because only workers that serve GPU services need it.
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
        except nvml.NVMLError as exc:  # fallen off the bus, or not ours to see
            logger.warning("GPU %d is left out: NVML says %s; see nvidia-smi", index, exc)


def _device(
    nvml: Any, handle: Any, index: int, kinds: Collection[str], slice_of: str = ""
) -> Device:
    name, size, token = nvml.nvmlDeviceGetName(handle), 0.0, str(index)
    with contextlib.suppress(nvml.NVMLError):  # devices that share the memory of the machine
        size = nvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
    with contextlib.suppress(nvml.NVMLError):
        token = nvml.nvmlDeviceGetUUID(handle)
    kinds = kinds_of(name, size, kinds)
    return Device(
        name=name, token=token, memory_gb=size, index=index, kinds=kinds, slice_of=slice_of
    )


def _is_cut(nvml: Any, handle: Any) -> bool:
    """Whether a GPU is in MIG mode: nothing but its slices can be used."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a GPU that has no such mode
        return False
    return bool(mode == nvml.NVML_DEVICE_MIG_ENABLE)


def kinds_of(name: str, memory_gb: float, candidates: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds that a product is, the most general first.

    A kind is named by words of the product that stand together (``RTX_4090`` or ``RTX4090`` is a
    "NVIDIA GeForce RTX 4090"); one that ends in a number, as ``A100_80`` does, is also an ``A100``
    with about that many GB.

    Args:
        name: the product, as NVML names it.
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
        value: of the variable: indexes, UUIDs, beginnings of UUIDs; ``None`` where it is unset. A
            GPU that is cut into slices stands for all of them.

    Raises:
        ConfigurationError: for an entry that names no device, or several.
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
    """Return the variables by which a process sees these devices alone; none without devices."""
    if not devices:
        return {}
    variables = {VISIBLE: ",".join(device.token for device in devices)}
    if all(device.token.isdecimal() for device in devices):
        # Else CUDA counts the quickest device as the first, and NVML does not.
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
    # A GPU stands for all its slices; the beginning of a slice's UUID must not fit several.
    if not are_of_one_gpu or (len(named) > 1 and named[0].token.startswith(token)):
        raise errors.ConfigurationError(
            f"{VISIBLE}={value!r}: {token!r} names {len(named) or 'no'} devices; there are "
            f"{', '.join(device.token for device in there) or 'none'}, "
            f"or count them from 0 in the order of nvidia-smi ({machine})"
        )
    return named
