"""The GPUs of a machine: the kinds of each, and those that a worker may use."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from gw_celery import errors

VISIBLE = "CUDA_VISIBLE_DEVICES"

#: The memory of a device, for each GB in the name of its kind: product names count in 10**9 or in
#: 2**30 bytes, and the driver keeps some.
_LEAST, _MOST = 0.95, 1.08
#: Entries that end the list of visible devices, as they do for CUDA.
_END = re.compile(r"|-\d+|NoDevFiles")


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

    def has(self, kind: str) -> bool:
        return any(kind in device.kinds for device in self.devices)


#: The machine of a worker that needs no device.
NONE = Machine(devices=(), source="nothing")


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
    kinds = [
        kind for kind in candidates if _is_named(kind, runs) or _is_sized(kind, runs, memory_gb)
    ]
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


def _is_named(kind: str, runs: set[str]) -> bool:
    return kind.replace("_", "") in runs


def _is_sized(kind: str, runs: set[str], memory_gb: float) -> bool:
    base, _, size = kind.rpartition("_")
    if not (base and size.isdecimal() and _is_named(base, runs)):
        return False
    return _LEAST * int(size) <= memory_gb <= _MOST * int(size)


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
