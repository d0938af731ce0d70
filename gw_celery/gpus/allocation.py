"""Divides the GPUs among a worker's replicas, which decides how many fit; in the worker's parent.

A replica holds one copy of everything that its worker serves. For each kind of GPU, it takes as
many devices as the largest ``count`` of a service of that kind. Its services share these devices,
and need the sum of their ``memory_gb`` on each. Replicas share a device only if these sums fit into
its memory. If one service has no ``memory_gb``, the replica has its devices alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gw_celery import errors
from gw_celery.declare import gpu
from gw_celery.gpus import devices

#: Maximum number of replicas: a tiny ``memory_gb``, or a typing error, must not cause millions.
MOST = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """The devices of one kind of GPU that one replica takes."""

    kind: str
    count: int = 1
    #: On each device; ``None``: all of it.
    memory_gb: float | None = None

    def __str__(self) -> str:
        share = "all to itself" if self.memory_gb is None else f"with {self.memory_gb:g} GB on each"
        return f"{self.count} x {self.kind} {share}"

    def room_on(self, device: devices.Device) -> int:
        """Return the number of replicas that fit on ``device``."""
        if self.kind not in device.kinds or (self.count > 1 and device.slice_of):
            return 0
        return 1 if self.memory_gb is None else int(device.memory_gb / self.memory_gb + 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allotment:
    """The devices of each replica, by its number; each new child gets the same."""

    needs: tuple[Need, ...]
    machine: devices.Machine
    shares: tuple[tuple[devices.Device, ...], ...]

    @property
    def most(self) -> int:
        return len(self.shares)

    def refusal(self, wanted: int) -> str | None:
        """Return why this many replicas do not fit; ``None`` if they do."""
        if wanted <= self.most:
            return None
        return (
            f"{wanted} replicas were asked for, and {self.most} fit: each needs "
            f"{' and '.join(map(str, self.needs))}, and this machine has {self.machine}"
        )


def needs_of(declared: Iterable[gpu.Gpu | None]) -> tuple[Need, ...]:
    """Return the devices of one replica that holds services with these declarations.

    Services without a kind, or for the CPU, take no device. One ``A100_80`` serves both ``A100``
    and ``A100_80``.
    """
    gpus = [device for device in declared if device is not None and device.kind != "CPU"]
    kinds = {device.kind for device in gpus}
    grouped: dict[str, list[gpu.Gpu]] = {}
    for device in gpus:
        special = [kind for kind in kinds if kind.startswith(f"{device.kind}_")]
        grouped.setdefault(max(special, key=len, default=device.kind), []).append(device)
    needs = []
    for kind, alike in sorted(grouped.items()):
        sizes = [device.memory_gb for device in alike if device.memory_gb is not None]
        memory = sum(sizes) if len(sizes) == len(alike) else None
        count = max(device.count for device in alike)
        needs.append(Need(kind=kind, count=count, memory_gb=memory))
    return tuple(needs)


def allot(needs: Sequence[Need], machine: devices.Machine) -> Allotment:
    """Give devices to as many replicas as fit.

    Raises:
        ConfigurationError: if no replica fits.
    """
    shares = tuple(itertools.islice(_shares(needs, machine.devices), MOST))
    if not shares:
        raise errors.ConfigurationError(
            f"a replica needs {' and '.join(map(str, needs))}, and this machine has {machine}. "
            f"Start this worker where there is one, or serve fewer services with it"
            f"{_remedy(needs, machine)}"
        )
    return Allotment(needs=tuple(needs), machine=machine, shares=shares)


def families_for(
    kind: str | None, declared: Mapping[str, Sequence[gpu.Gpu | None]], machine: devices.Machine
) -> list[str]:
    """Return the families that a worker on ``machine`` consumes.

    Args:
        kind: the kind of GPU to serve; ``CPU`` for the family ``cpu``; ``None`` for every family
            that the devices can serve, or ``cpu`` if there is none.
        declared: the declarations of the services of each family.
        machine: the devices of this machine.

    Raises:
        ConfigurationError: if there is none; the message lists the families and devices.
    """
    known = {known for device in machine.devices for known in device.kinds}
    if kind is not None and kind not in {"CPU", *known}:
        remedy = _remedy([Need(kind=kind)], machine)
        raise errors.ConfigurationError(f"--gpu {kind}: this machine has {machine}{remedy}")
    fitting = [name for name in sorted(declared) if _can_serve(declared[name], machine)]
    if kind is None:
        families = [name for name in fitting if name != "cpu"] or fitting
    else:
        counts = (1,) if kind == "CPU" else range(1, 9)
        of_kind = (gpu.Gpu(kind, count).family for count in counts)
        families = [name for name in of_kind if name in fitting]
    if not families:
        there = "" if kind == "CPU" else f"; this machine has {machine}"
        if kind is None:
            there += '; what needs no GPU declares gpu=gw.Gpu("CPU")'
        asked = "gw worker" if kind is None else f"--gpu {kind}"
        raise errors.ConfigurationError(
            f"{asked}: no service here can be served; families: {_described(declared)}{there}"
        )
    return families


def _shares(
    needs: Sequence[Need], there: Sequence[devices.Device]
) -> Iterator[tuple[devices.Device, ...]]:
    """Yield the devices of replica 0, 1, ...; devices with most room first, so that few share."""
    # For each need, the remaining room of its devices by index; a device serves one need only.
    rooms: list[tuple[Need, dict[int, int]]] = []
    taken: set[int] = set()
    for need in needs:
        left = [index for index in range(len(there)) if index not in taken]
        room = {index: need.room_on(there[index]) for index in left if need.room_on(there[index])}
        rooms.append((need, room))
        taken.update(room)
    while rooms:
        share: list[int] = []
        for need, room in rooms:
            free = sorted((index for index in room if room[index]), key=lambda i: -room[i])
            if len(free) < need.count:
                return
            share += sorted(free[: need.count])
            for index in free[: need.count]:
                room[index] -= 1
        yield tuple(there[index] for index in share)


def _can_serve(declared: Sequence[gpu.Gpu | None], machine: devices.Machine) -> bool:
    """Return whether each service alone finds its devices; the CPU needs none."""
    if all(device is None for device in declared):
        return bool(machine.devices)
    each = [needs_of([device]) for device in declared]
    return all(not needs or any(_shares(needs, machine.devices)) for needs in each)


def _described(declared: Mapping[str, Sequence[gpu.Gpu | None]]) -> str:
    texts = []
    for name, gpus in sorted(declared.items()):
        needs = dict.fromkeys(str(need) for device in gpus for need in needs_of([device]))
        texts.append(f"{name} (needs {' or '.join(needs)})" if needs else name)
    return ", ".join(texts) or "none: is their module imported"


def _remedy(needs: Iterable[Need], machine: devices.Machine) -> str:
    if devices.VISIBLE in machine.source:
        return f"; {devices.VISIBLE} hides devices from this worker: unset it, or name others in it"
    fakes = []
    for need in needs:
        # A kind of the setting gw_gpu_kinds has no known memory size.
        size = need.memory_gb or (None if need.kind in gpu.KINDS else 24.0)
        fakes.append(f"{need.kind}{'' if size is None else f'/{size:g}'}:{need.count}")
    return f"; to run without GPUs while you develop, set GW_FAKE_GPUS={','.join(fakes)}"
