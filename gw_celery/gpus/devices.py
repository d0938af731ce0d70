"""The GPUs of a machine: which kinds each is, and which of them a worker may use."""

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
#: What ends the list of visible devices, as it does for CUDA.
_END = re.compile(r"|-\d+|NoDevFiles")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or one MIG slice of a GPU."""

    #: The product, as NVML names it.
    name: str
    #: How CUDA is told of it: its UUID, or its index where NVML gives none.
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
    """The devices that a worker may use, and where it learnt of them."""

    devices: tuple[Device, ...]
    #: For error messages.
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


#: No device, where none is needed.
NONE = Machine(devices=(), source="nothing")


def kinds_of(name: str, memory_gb: float, known: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds that a product is, the most general first.

    A kind is named by words of the product that stand together (``RTX_4090`` or ``RTX4090`` is a
    "NVIDIA GeForce RTX 4090"); one that ends in a number, as ``A100_80`` does, is also an ``A100``
    with about that many GB.
    """
    words = re.findall(r"[A-Z0-9]+", name.upper())
    ends = range(1, len(words) + 1)
    runs = {"".join(words[start:end]) for end in ends for start in range(end)}
    found = [kind for kind in known if _is_named(kind, runs) or _is_sized(kind, runs, memory_gb)]
    return tuple(sorted(found, key=len))


def only_visible(machine: Machine, given: str | None) -> Machine:
    """Return ``machine`` with what ``CUDA_VISIBLE_DEVICES`` leaves of it, in that order.

    Args:
        given: its value: indexes, UUIDs, beginnings of UUIDs; ``None`` where it is unset. A GPU
            that is cut into slices stands for all of them.

    Raises:
        ConfigurationError: for what names no device, or several.
    """
    if given is None:
        return machine
    found: list[Device] = []
    for token in map(str.strip, given.split(",")):
        if _END.fullmatch(token):
            break
        found += [device for device in _named(token, machine, given) if device not in found]
    return Machine(devices=tuple(found), source=f"{machine.source}, {VISIBLE}={given!r}")


def environment(devices: Sequence[Device]) -> Mapping[str, str]:
    """Return the variables by which a process sees these devices alone; none without devices."""
    if not devices:
        return {}
    seen = {VISIBLE: ",".join(device.token for device in devices)}
    if all(device.token.isdecimal() for device in devices):
        # Else CUDA counts the quickest device as the first, and NVML does not.
        seen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return seen


def _is_named(kind: str, runs: set[str]) -> bool:
    return kind.replace("_", "") in runs


def _is_sized(kind: str, runs: set[str], memory_gb: float) -> bool:
    base, _, size = kind.rpartition("_")
    if not (base and size.isdecimal() and _is_named(base, runs)):
        return False
    return _LEAST * int(size) <= memory_gb <= _MOST * int(size)


def _named(token: str, machine: Machine, given: str) -> list[Device]:
    if token.isdecimal():
        found = [device for device in machine.devices if device.index == int(token)]
    else:
        found = [device for device in machine.devices if device.token == token]
        found = found or [device for device in machine.devices if device.token.startswith(token)]
        found = found or [device for device in machine.devices if device.slice_of.startswith(token)]
    if not found or (len({device.index for device in found}) > 1) or _is_unclear(token, found):
        raise errors.ConfigurationError(
            f"{VISIBLE}={given!r}: {token!r} names {len(found) or 'no'} devices; there are "
            f"{', '.join(device.token for device in machine.devices) or 'none'}, "
            f"or count them from 0 in the order of nvidia-smi ({machine})"
        )
    return found


def _is_unclear(token: str, found: Sequence[Device]) -> bool:
    """Whether the beginning of a slice's UUID fits several."""
    return len(found) > 1 and found[0].token.startswith(token)
